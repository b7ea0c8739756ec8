"""Wrong manifests, with all digests recomputed."""

from pathlib import Path
from typing import Any

from tests.attacks import attack
from tests.tiny import redigest


def first_recipe(manifest: dict[str, Any], code: str = "") -> dict[str, Any]:
    """Return the first recipe, or the first recipe of `code` if that is not empty."""
    recipe: dict[str, Any] = next(recipe for recipe in manifest["recipes"] if not code or recipe["code"] == code)
    return recipe


@attack("canonical")
def format_of_the_future(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(format=2))


@attack("canonical")
def format_that_is_a_text(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(format="1"))


@attack("canonical")
def code_that_nobody_knows(folder: Path) -> None:
    redigest(folder, lambda manifest: first_recipe(manifest).update(code="\x1b[31mzip"))


@attack("canonical")
def code_that_is_no_text(folder: Path) -> None:
    redigest(folder, lambda manifest: first_recipe(manifest).update(code={"a": 1}))


@attack("canonical")
def recipe_that_takes_what_it_makes(folder: Path) -> None:
    def make_cycle(manifest: dict[str, Any]) -> None:
        recipe = first_recipe(manifest)
        recipe["takes"] = dict.fromkeys(recipe["takes"], recipe["makes"][0][0])

    redigest(folder, make_cycle)


@attack("canonical")
def recipes_twice(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest["recipes"].extend(manifest["recipes"]))


@attack("canonical")
def recipes_by_the_hundred_thousand(folder: Path) -> None:
    def chain(manifest: dict[str, Any]) -> None:
        spec = "U8[8]"
        manifest["recipes"] += [
            {"code": "entropy", "takes": {"entropy": f"x{n}"}, "makes": [[f"x{n + 1}", spec]], "params": {"bytes": 7}}
            for n in range(100_000)
        ]

    redigest(folder, chain)


@attack("canonical")
def bytes_of_four_hundred_digits(folder: Path) -> None:
    redigest(folder, lambda manifest: first_recipe(manifest, "entropy")["params"].update(bytes=10**400))


@attack("canonical")
def bytes_below_zero(folder: Path) -> None:
    redigest(folder, lambda manifest: first_recipe(manifest, "entropy")["params"].update(bytes=-1))


@attack("canonical")
def kind_of_a_petabyte(folder: Path) -> None:
    def grow(manifest: dict[str, Any]) -> None:
        first_recipe(manifest, "entropy")["makes"][0][1] = "F16[1048576, 524288]"

    redigest(folder, grow)


@attack("canonical")
def kind_that_is_none(folder: Path) -> None:
    redigest(folder, lambda manifest: first_recipe(manifest)["makes"][0].__setitem__(1, "F16[1, 2, "))


@attack("canonical")
def digests_of_what_is_not_there(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest["digests"].update(x="0" * 32))


@attack("canonical")
def digests_that_are_none(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(digests=dict.fromkeys(manifest["digests"], 7)))


@attack("canonical")
def notes_that_are_none(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(notes=[{"site": "0", "reason": "\x1b[2J"}, 7]))


@attack("canonical")
def reason_with_escapes_for_the_terminal(folder: Path) -> None:
    reason = "\x1b]0;gone\x07\n\n" + "x" * 1_000_000
    redigest(folder, lambda manifest: manifest.update(notes=[{"site": 0, "name": reason, "reason": reason}]))


@attack("canonical")
def history_that_makes_no_sense(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(history=[{"bytes": {"dense": 10**400}}, {"transform": ["\x1b"]}]))


@attack("canonical")
def producer_that_is_no_text(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(producer=["freebits"]))


@attack("canonical")
def field_that_nobody_knows(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(run="rm -rf /"))


@attack("canonical")
def manifest_that_is_no_json(folder: Path) -> None:
    (folder / "freebits.json").write_text("{")


@attack("none")
def originals_that_disagree(folder: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        header = manifest["originals"]["model.safetensors"]
        manifest["originals"]["model.safetensors"] = header.replace("F16", "BF16", 1)

    redigest(folder, swap)


@attack("none")
def originals_with_a_surrogate(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest["originals"].update({"config.json": "\ud800"}))
