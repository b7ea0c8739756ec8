"""Configs with huge or invalid values."""

import json
from pathlib import Path
from typing import Any

from tests.attacks import attack
from tests.tiny import change_config

HUGE = 10**9


def packed_config(folder: Path, **changes: Any) -> None:
    """Change the model's config in a packed folder, and recompute the digests."""
    from freebits.packed.manifest import digest_of_file
    from tests.tiny import redigest

    config = json.loads((folder / "config.json").read_text())
    config["model"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    redigest(folder, lambda manifest: manifest.update(config=digest_of_file(folder / "config.json")))


@attack("dense")
def blocks_by_the_billion(folder: Path) -> None:
    change_config(folder, num_hidden_layers=HUGE)


@attack("dense")
def words_by_the_trillion(folder: Path) -> None:
    change_config(folder, vocab_size=10**12)


@attack("dense")
def width_of_a_billion(folder: Path) -> None:
    change_config(folder, hidden_size=HUGE)


@attack("dense")
def mlp_of_a_billion(folder: Path) -> None:
    change_config(folder, intermediate_size=HUGE)


@attack("dense")
def heads_by_the_billion(folder: Path) -> None:
    change_config(folder, num_attention_heads=HUGE, num_key_value_heads=HUGE)


@attack("dense")
def heads_that_are_none(folder: Path) -> None:
    change_config(folder, num_attention_heads=0)


@attack("dense")
def positions_by_the_trillion(folder: Path) -> None:
    change_config(folder, max_position_embeddings=10**12)


@attack("dense")
def sizes_that_are_texts(folder: Path) -> None:
    change_config(folder, hidden_size="32", num_hidden_layers=[3])


@attack("dense")
def config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


@attack("dense")
def config_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 500_000 + "]" * 500_000 + "}")


@attack("dense")
def config_of_gigabytes(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(3 * 2**30)


@attack("dense")
def config_with_other_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")


@attack("dense")
def model_type_that_is_a_path(folder: Path) -> None:
    change_config(folder, model_type="../../etc/passwd")


@attack("sliced")
def sites_by_the_million(folder: Path) -> None:
    change_config(folder, site_sizes=[32] * 10**6)


@attack("sliced")
def sites_as_wide_as_a_galaxy(folder: Path) -> None:
    change_config(folder, site_sizes=[2**31 - 1] * 7)


@attack("sliced")
def sites_that_are_no_numbers(folder: Path) -> None:
    change_config(folder, site_sizes=[None, "a", -1, 1.5, True, {}, []])


@attack("canonical")
def shortcuts_of_rank_nothing(folder: Path) -> None:
    packed_config(folder, shortcut_ranks=[0] * 6)


@attack("canonical")
def shortcuts_of_rank_nothing_between_wide_sites(folder: Path) -> None:
    packed_config(folder, shortcut_ranks=[0] * 6, site_sizes=[131072] * 7)


@attack("canonical")
def inner_config_of_another_model(folder: Path) -> None:
    packed_config(folder, model_type="gpt2")


@attack("canonical")
def inner_config_without_a_type(folder: Path) -> None:
    packed_config(folder, model_type=None)


@attack("low rank")
def ranks_by_the_billion(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, low_ranks=dict.fromkeys(config["low_ranks"], HUGE))


@attack("low rank")
def ranks_of_layers_that_are_not_there(folder: Path) -> None:
    change_config(folder, low_ranks={"model.layers.7.mlp.up_proj": 3, "../x": 2})


@attack("low rank")
def ranks_that_are_a_list(folder: Path) -> None:
    change_config(folder, low_ranks=[3])
