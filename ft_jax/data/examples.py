"""From a row of a source to what an objective learns from: its text, pair, prompt and label, checked."""

import re
import string

from ft_jax.errors import UserError, nearest


def template_fields(template):
    """``[(literal, field or None)]`` of a template like ``"{question}\\nAnswer:"``; plain field names alone."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; write a literal brace twice") from None
    out = []
    for literal, field, spec, conversion in parts:
        if field is not None and (spec or conversion or not re.fullmatch(r"\w+", field) or field.isdigit()):
            written = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(f"template {template!r}: {{{written}}} is no plain field name")
        out.append((literal, field))
    return out


def render(fields, row, where):
    """``(text, [(start, end) of each field in it])`` of a template for a row; a field must hold text or a number."""
    out, spans, length = [], [], 0
    for literal, field in fields:
        out.append(literal)
        length += len(literal)
        if field is not None:
            value = _field(row, field, where)
            if not isinstance(value, str | int | float):
                raise UserError(f"{where}: the template's field {field!r} holds a {type(value).__name__}, not text")
            out.append(str(value))
            spans.append((length, length + len(out[-1])))
            length = spans[-1][1]
    return _utf8("".join(out), "template", where), spans


def _field(row, field, where):
    if row.get(field) is None:
        if field in row:
            raise UserError(f"{where}: the field {field!r} has no value")
        raise UserError(f"{where}: no field {field!r}{nearest(field, row)}")
    return row[field]


def text_of(row, field, where, empty=False):
    """The text of a field; UserError when it is missing, empty (unless allowed) or no text."""
    value = _field(row, field, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} holds a {type(value).__name__}, not text")
    if not empty and not value.strip():
        raise UserError(f"{where}: the field {field!r} is empty")
    return _utf8(value, field, where)


def _utf8(text, field, where):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"{where}: the field {field!r} holds half a character ({half})") from None
    return text


def label_of(row, field, num_labels, names, where):
    """The label as an integer in [0, num_labels): a whole number, its digits, or one of ``names``."""
    value = _field(row, field, where)
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        value = int(value)
    if isinstance(value, str):
        hint = nearest(value, names) if names else "; labels are numbers from 0, or give label_names"
        raise UserError(f"{where}: unknown label {value!r} in the field {field!r}{hint}")
    if not isinstance(value, int) and not (isinstance(value, float) and value.is_integer()):
        raise UserError(f"{where}: the label {value!r} in the field {field!r} is no whole number")
    if not 0 <= value < num_labels:
        raise UserError(f"{where}: label {int(value)} in the field {field!r} is outside 0 to {num_labels - 1} "
                        f"(num_labels is {num_labels})")
    return int(value)
