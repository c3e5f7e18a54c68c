"""TensorBoard's event files; apart from `runs`, as tensorboardX imports torch where that is installed, which takes 200 MB."""

import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """One event file in ``folder``."""

    def __init__(self, folder):
        # Not SummaryWriter: its thread dies silently on a full disk, and the training then waits for it for ever.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self.close = self._writer.close

    def log(self, step, metrics):
        for key, value in metrics.items():
            self._writer.write_event(Event(step=step, wall_time=time.time(), summary=scalar(key, value)))
        self._writer.flush()

    def restart(self, step):
        """Has TensorBoard hide what was written from ``step`` on."""
        self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
