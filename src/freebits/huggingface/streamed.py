"""What a model makes of a text, with one block in memory, whatever the model's size."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from freebits.checkpoint import Source
from freebits.errors import UnsupportedModelError
from freebits.huggingface.blockwise import BlockwiseModel
from freebits.huggingface.loading import load
from freebits.huggingface.naming import InMemory, known_config
from freebits.report import opened


@torch.no_grad()
def window_logits(path: Path, windows: Tensor, seen: Callable[[Source], Source] | None = None) -> Iterator[Tensor]:
    """The logits for the tokens after the first of each window, (T - 1, V), in float32.

    Memory holds a block, the embeddings and the windows' stream; the whole model where it has no blocks to go through.

    Args:
        path: folder of a dense, sliced or packed checkpoint.
        windows: (windows, T).
        seen: gives the model in another form.

    Raises:
        UnsupportedModelError: it cannot be run block by block, and so not in another form.
    """
    source = opened(path)
    try:
        if source.config.get("quantization_config"):
            raise UnsupportedModelError("its numbers are not its weights")  # noqa: TRY301  (as of others below)
        config = known_config(source, path)
        model = BlockwiseModel(InMemory(seen(source) if seen else source, config), config, torch.device("cpu"))
    except UnsupportedModelError:
        if seen:
            raise
        whole = load(path, dtype=torch.float32).eval()
        yield from (whole(input_ids=window[None], use_cache=False).logits[0, :-1] for window in windows)
        return
    streams = list(model.embed(windows))
    for number in range(len(model.blocks)):
        run = model.block(number)
        for place, x in enumerate(streams):
            streams[place] = run(x)
    model.unload()
    yield from (model.logits(x, window)[:-1] for x, window in zip(streams, windows, strict=True))
