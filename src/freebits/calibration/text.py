"""The embedded text: Python's own documentation, split into calibration and held-out topics.

It needs no download. For a model meant for use, calibrate on text like the text it will see.
"""

from pydoc_data.topics import topics

_HELD_OUT_EVERY = 4


def embedded_text() -> tuple[str, str]:
    """Calibration text and held-out text, with no paragraph in common.

    Every fourth topic is held out. Some topics quote others whole, so paragraphs that a held-out topic
    contains are taken out of the calibration text.
    """
    names = sorted(topics)
    held_out = [topics[name] for name in names[::_HELD_OUT_EVERY]]
    quoted = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    rest = (topics[name] for index, name in enumerate(names) if index % _HELD_OUT_EVERY)
    calibration = ("\n\n".join(p for p in text.split("\n\n") if p not in quoted) for text in rest)
    return "\n\n".join(calibration), "\n\n".join(held_out)
