import pytest

from tests.launchers.stubs import Stubs


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)
