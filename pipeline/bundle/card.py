"""The card of a bundle on the hub: front matter as the hub takes it, formats, gates, size, how to run it, recipe.

It says what manifests and reports say, and of the licence what the model's own card says; nothing is made up.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from export.documents import Rules, read_json, read_text
from export.errors import ContractError, ModelError, ParityError, UserError
from export.models.sources import ZOO, find
from export.models.weights import PICKLES
from pipeline import machine
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.bundle.contents import listed_files
from pipeline.bundle.hub import CARD, Repository
from pipeline.files import MANIFEST_FILE

logger = logging.getLogger(__name__)

REPORT, RECIPE = "report/parity.json", "recipe.toml"
# Of the bundled models, which are part of this package.
OWN_LICENSE = "apache-2.0"
# A field of a card's front matter, with a text in quotes or without.
LICENSE_LINE = re.compile(
    r"^(license\w*):[ \t]+(?:\"([^\"\n]+)\"|'([^'\n]+)'|([^\s\"'#][^\n]*?))[ \t]*(?:[ \t]#.*)?$", re.MULTILINE
)
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/\w+)?(?:@.+)?")


class GateRow(TypedDict):
    """One gate of a report; value and limit null or a text where they are no numbers of JSON."""

    name: str
    value: float | Literal["inf", "-inf"] | None
    limit: float | Literal["inf", "-inf"] | None
    unit: str
    passed: bool
    at_most: bool


class Parity(TypedDict):
    """What is read here of report/parity.json."""

    passed: bool
    gates: list[GateRow]


@dataclass(frozen=True)
class Part:
    """A bundle, by itself or as the component `name` of a pipeline (None: by itself), and the gates it has passed."""

    name: str | None
    bundle: Bundle
    gates: list[GateRow]


@dataclass(frozen=True)
class License:
    """Fields of a card's front matter. name, link: of one that the hub has no identifier of."""

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def text(self) -> str:
        """For people: its name where the hub has no identifier of it."""
        return self.name or self.identifier


UNKNOWN = License("unknown")


def read_parts(folder: Path) -> list[Part]:
    """The bundles in a folder, each with every file verified and its gates read.

    Raises ContractError for a folder that is no bundle, and ParityError where a gate did not pass.
    """
    names = listed_files(folder, lambda name: (folder / name).is_file())
    places = [name.rpartition("/")[0] or None for name in names if name.rpartition("/")[2] == MANIFEST_FILE]
    if not places:
        raise ContractError(f"{folder} is a pipeline without a single bundle; build it again")
    return [_part(place, load_bundle(folder / (place or ""))) for place in places]


def _part(name: str | None, bundle: Bundle) -> Part:
    with bundle.copied({REPORT}.__contains__) as private:
        if not (private.path / REPORT).is_file():
            raise ContractError(f"{bundle.path} has no {REPORT}, so nothing says that its gates passed; build it again")
        parity = read_json(private.path / REPORT, Parity, Rules(version=1))
    failed = [row["name"] for row in parity["gates"] if not row["passed"]]
    if failed or not parity["passed"] or not parity["gates"]:
        what = f"{failed[0]} did not pass" if failed else "its gates did not pass"
        raise ParityError(f"{bundle.path}: {what}, see {REPORT}; build it again, only what is proven is handed on")
    return Part(name, bundle, parity["gates"])


# --- whose model it is ------------------------------------------------------------------------------------------------


def base_model(source: str) -> str | None:
    """The hub id that a model's source names, None for a folder, a file or a bundled model.

    >>> base_model("PixArt-alpha/PixArt-XL-2-512x512/text_encoder@main"), base_model("/models/pixart")
    ('PixArt-alpha/PixArt-XL-2-512x512', None)
    """
    match = HUB_ID.fullmatch(source)
    is_file = source.endswith((*PICKLES, ".safetensors", ".gguf"))
    return match[1] if match and not is_file and not Path(source).exists() else None


def license_of(source: str) -> License:
    """What the card in the model's folder says, or in its pipeline's; UNKNOWN where there is none that says it.

    Looked for here alone: in the folder, or in the hub's cache.
    """
    if source.startswith("zoo:"):
        return License(OWN_LICENSE)
    try:
        place, _ = find(source)
    except UserError:  # no longer here
        return UNKNOWN
    if place.is_relative_to(ZOO):  # a part of a bundled pipeline
        return License(OWN_LICENSE)
    folder = place if place.is_dir() else place.parent
    stated = (card_license(path) for path in (folder / CARD, folder.parent / CARD) if path.is_file())
    return next((license for license in stated if license is not None), UNKNOWN)


def card_license(path: Path) -> License | None:
    """What the front matter of a card says, None where it says nothing of a licence, or cannot be read."""
    try:
        text = read_text(path, Rules(ModelError, "mend the card"))
    except ModelError as error:
        logger.warning("%s", error)
        return None
    front = re.match(r"---\n(.*?)\n---\s", text, re.DOTALL)
    rows = LICENSE_LINE.finditer(front[1]) if front else ()
    lines = {row[1]: row[2] or row[3] or row[4] for row in rows}
    if "license" not in lines:
        return None
    return License(lines["license"], lines.get("license_name"), lines.get("license_link"))


# --- text -------------------------------------------------------------------------------------------------------------


def compose(parts: Sequence[Part], repository: Repository, license: License | None = None) -> str:
    """The card of what is put there. license: as the user says; None: as the models' cards say."""
    sources = [part.bundle.manifest["model"]["source"] for part in parts]
    licenses = [license] if license else list(dict.fromkeys(map(license_of, sources)))
    sections = [
        front_matter(parts, list(dict.fromkeys(filter(None, map(base_model, sources)))), licenses),
        f"# {repository.name.partition('/')[2]}",
        f"Low-bit engines, built and proven by `{machine.PROGRAM}` {machine.own_version()}. "
        "The files are data only; each is verified against the manifest before it is used.",
        "## Run",
        usage(parts, repository),
        *(section for part in parts for section in part_sections(part)),
        "## Licence",
        _license_text(licenses),
    ]
    return "\n\n".join(sections) + "\n"


def front_matter(parts: Sequence[Part], bases: Sequence[str], licenses: Sequence[License]) -> str:
    """YAML of scalars and lists of scalars, every text quoted. Several licences become `other`, by name."""
    single = licenses[0] if len(licenses) == 1 else License("other", " and ".join(row.identifier for row in licenses))
    formats = {
        name for part in parts for pair in part.bundle.manifest["counts"]["formats"] for name in pair.split(" x ")
    }
    families = {part.bundle.manifest["model"]["family"] for part in parts}
    rows: dict[str, str | Sequence[str] | None] = {
        "license": single.identifier,
        "license_name": single.name,
        "license_link": single.link,
        "base_model": bases or None,
        "base_model_relation": "quantized" if bases else None,
        "library_name": machine.PROGRAM,
        "tags": [machine.PROGRAM, "quantized", "onnx", *sorted(families), *sorted(name.lower() for name in formats)],
    }
    lines = []
    for key, value in rows.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        elif value is not None:
            lines += [f"{key}:", *(f"- {_quoted(entry)}" for entry in value)]
    return "\n".join(["---", *lines, "---"])


def _quoted(text: str) -> str:
    """A text of YAML in single quotes, in which nothing but they is special; on one line."""
    return "'" + " ".join(text.split()).replace("'", "''") + "'"


def usage(parts: Sequence[Part], repository: Repository) -> str:
    """How to run it, in three lines."""
    only = parts[0].bundle if len(parts) == 1 else None
    lines = [f"pip install '{machine.PROGRAM}[hub]'"]
    if only is not None and not only.is_denoiser:
        lines += ["python", f'>>> from ditc import load; engine = load("{repository}").engine()']
    elif only is not None and "generation.json" not in only.manifest["files"]:
        lines[0] = f"pip install '{machine.PROGRAM}[build,hub]'"
        lines += ["python", f'>>> from ditc import load; pipe.transformer = load("{repository}").as_diffusers()']
    else:
        lines += [f'ditc generate {repository} --prompt "..." -o out.png', f"ditc serve {repository}"]
    return "\n".join(f"    {line}" for line in lines)


def part_sections(part: Part) -> Iterable[str]:
    """Formats, size, gates and recipe of one bundle."""
    document, title = part.bundle.manifest, part.name or "Engine"
    model, counts, sizes = document["model"], document["counts"], document["bytes"]
    source = model["source"] if model["source"].startswith("zoo:") or base_model(model["source"]) else "a folder"
    revision = f", revision {model['revision']}" if model["revision"] else ""
    yield f"## {title}"
    adapters = "".join(
        f", the adapter `{row['file']}` (sha256 `{row['sha256'][:16]}...`) merged into it at scale {row['scale']!r}"
        for row in model.get("adapters", [])
    )
    yield (
        f"Made of {source}{revision}{adapters} (sha256 of the weights `{model['sha256'][:16]}...`), family "
        f"`{model['family']}`, by the recipe `{document['engine']}`; targets: {', '.join(document['targets'])}. "
        f"{counts['quantized']} linears are quantized, {counts['kept']} are kept. The weights of the former take "
        f"{sizes['quantized_weights'] / 1e6:.1f} MB, in fp16 {sizes['same_weights_fp16'] / 1e6:.1f} MB; all files take "
        f"{sizes['all_files'] / 1e6:.1f} MB."
    )
    yield _table(("weights x activations", "linears"), counts["formats"].items())
    yield f"### Gates of {title}" if part.name else "### Gates"
    yield "What was proven when it was built, see `report/index.html`:"
    yield _table(
        ("gate", "value", "", "limit", "unit"),
        [
            (f"`{row['name']}`", _number(row["value"]), "at most" if row["at_most"] else "at least",
             _number(row["limit"]), row["unit"])
            for row in part.gates
        ],
    )  # fmt: skip
    yield f"### Recipe of {title}" if part.name else "### Recipe"
    with part.bundle.copied({RECIPE}.__contains__) as private:
        path = private.path / RECIPE
        recipe = read_text(path) if path.is_file() else ""
    yield f"```toml\n{recipe.strip()}\n```"


def _license_text(licenses: Sequence[License]) -> str:
    if UNKNOWN in licenses:
        return "The model's folder does not say under which licence it is; ask whoever made the model."
    names = " and ".join(row.name or row.identifier for row in licenses)
    return f"That of the model: {names}."


def _number(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.5g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)


def sources(parts: Sequence[Part]) -> Mapping[str, str]:
    """Folders of the machine that built the bundles, which their manifests name, by the engine's name."""
    stated = {part.bundle.name: part.bundle.manifest["model"]["source"] for part in parts}
    return {name: text for name, text in stated.items() if not text.startswith("zoo:") and base_model(text) is None}
