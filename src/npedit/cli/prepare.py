"""`npedit prepare`: from a folder of photos to a training set; and `npedit merge-shards`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import err, out
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.prepare_progress import progress_display
from npedit.cli.writers import (
    EngineOption,
    FolderOption,
    JpegQualityOption,
    MaxCostOption,
    ParametersOption,
    PriceInOption,
    PriceOutOption,
    PromptsOption,
    RayAddressOption,
    SeedOption,
    SideOption,
    VerifierModelOption,
    VerifierOption,
    VerifyOption,
    WorkersOption,
    WriterModelOption,
    WriterOption,
    open_engine,
    open_meter,
    open_models,
    print_usage,
    require_options,
)
from npedit.errors import UserError, train_command

if TYPE_CHECKING:
    from npedit.prepare.asking import Meter
    from npedit.prepare.prompts import Prompts


TypesOption = Annotated[
    str, typer.Option(help="Wanted edit types with shares: add=0.2,remove=0.3. If not given: ten types, equal.")
]
PerPhotoOption = Annotated[int, typer.Option(help="Wanted edits of each photo.", min=1, max=16)]
RoundsOption = Annotated[
    int, typer.Option(help="Rounds of asking. After the first, only photos that lack edits are asked.", min=1)
]
MinSideOption = Annotated[int, typer.Option(help="Photos with a shorter side below this are not used.", min=1)]
LanguageOption = Annotated[str, typer.Option(help="Language of the instructions; captions are English.")]
CustomOption = Annotated[
    Path | None, typer.Option(help="A YAML file with further edit_types, styles, examples, or a language.")
]
LicencesOption = Annotated[Path | None, typer.Option(help="A csv file with the columns file_name, licence, source.")]
DuplicatesOption = Annotated[
    str, typer.Option(help="Near-duplicate photos: one (keep one), mark (keep all, marked), off.")
]
SubjectsOption = Annotated[
    bool, typer.Option("--subjects", help="The photos of one sub-folder show one subject (edit type scene).")
]
HeldOutOption = Annotated[float, typer.Option("--held-out", help="Share of held-out rows.", min=0, max=0.5)]
DryRunOption = Annotated[
    int, typer.Option("--dry-run", help="Ask for so many photos only; show requests, answers, cost of all.", min=0)
]
ShardOption = Annotated[str, typer.Option(help="Work on part i of n of the photos, as i/n with i from 0.")]


def prepare(
    photos: Annotated[Path, typer.Argument(help="A folder of photos.")],
    folder: FolderOption = None,
    writer: WriterOption = None,
    writer_model: WriterModelOption = "",
    verifier: VerifierOption = None,
    verifier_model: VerifierModelOption = "",
    verify: VerifyOption = True,
    parameters: ParametersOption = "",
    types: TypesOption = "",
    per_photo: PerPhotoOption = 2,
    rounds: RoundsOption = 2,
    min_side: MinSideOption = 16,
    workers: WorkersOption = 8,
    side: SideOption = 1024,
    jpeg_quality: JpegQualityOption = 90,
    language: LanguageOption = "",
    prompts: PromptsOption = None,
    custom: CustomOption = None,
    licences: LicencesOption = None,
    duplicates: DuplicatesOption = "one",
    subjects: SubjectsOption = False,
    held_out: HeldOutOption = 0.02,
    dry_run: DryRunOption = 0,
    max_cost: MaxCostOption = 0,
    price_in: PriceInOption = 0,
    price_out: PriceOutOption = 0,
    seed: SeedOption = 0,
    shard: ShardOption = "",
    engine: EngineOption = "local",
    ray_address: RayAddressOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write a training set for a folder of photos: a vision-language model looks, writes edits, and verifies them.

    npedit prepare photos/ --out set/ --writer http://localhost:8000/v1 --writer-model NAME

    Pictures are scaled down and stripped of EXIF and GPS data before they are sent. The same command resumes.
    """
    target, writers = require_options(folder, writer)
    if duplicates not in ("one", "mark", "off"):
        raise UserError(f"--duplicates: expected one, mark or off; got {duplicates!r}; give one of them")
    if dry_run and as_json:
        raise UserError("expected --json or --dry-run; got both: a dry run shows requests and answers; leave one out")
    meter = open_meter(price_in, price_out, max_cost)
    loaded, shares, part = *load_wishes(prompts, custom, language, types), parse_shard(shard)
    served = (writers, writer_model, verifier or [], verifier_model)
    models = open_models(*served, verify, workers, jpeg_quality, parameters)
    job = Job(
        photos, target, loaded, models, open_engine(engine, ray_address, models), licences, meter,
        {"shares": shares, "per_photo": per_photo, "side": side, "seed": seed, "rounds": rounds, "min_side": min_side,
         "subjects": subjects, "duplicates": duplicates, "held_out": held_out, "shard": part},
    )  # fmt: skip
    return show_dry_run(job, dry_run) if dry_run else run_job(job, as_json)


@dataclass(frozen=True)
class Job:
    """One call of `npedit prepare`: `models` are (writer, verifier or None), `engine` None is the threads of this
    process, `settings` are those of `PrepareSettings`."""

    photos: Path
    target: Path
    prompts: Prompts
    models: tuple[Any, Any]
    engine: Any
    licences: Path | None
    meter: Meter
    settings: dict[str, Any]


def run_job(job: Job, as_json: bool = False) -> None:
    """Make the set and print what was made.

    Raises:
        UserError: bad input, a model that cannot be reached, or the cost ceiling.
    """
    from npedit.prepare.photos import read_rights_table
    from npedit.prepare.prepare import PrepareSettings
    from npedit.prepare.prepare import prepare as make_set

    table = read_rights_table(job.licences) if job.licences else {}
    settings, meter = PrepareSettings(**job.settings), job.meter
    with progress_display(bool(meter.price_in or meter.price_out), err) as report:
        facts = make_set(job.photos, job.target, settings, job.prompts, *job.models, meter, table, report, job.engine)
    print_summary(job.target, facts, as_json)


def load_wishes(
    folder: Path | None, custom: Path | None, language: str, types: str
) -> tuple[Prompts, dict[str, float]]:
    """(prompts, wanted shares of the edit types).

    Raises:
        UserError: a prompt, the custom file or a type is wrong.
    """
    from npedit.prepare.prompts import LOCAL_TYPES, load_prompts, parse_shares

    loaded = load_prompts(folder, custom, language)
    return loaded, parse_shares(types or ",".join(LOCAL_TYPES), list(loaded.edit_types))


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of --shard i/n; (0, 1) of "".

    Raises:
        UserError: it is not of that form.
    """
    if not text:
        return 0, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard: expected i/n with i from 0 to n - 1; got {text!r}; number the parts of n from 0")
    return int(number), int(count)


def print_summary(folder: Path, facts: dict[str, Any], as_json: bool = False) -> None:
    """What was made, what it cost, and how to train on it; with `as_json` the facts as they are in prepare.json.

    Raises:
        UserError: the run stopped at the cost ceiling, or requests got no answer.
    """
    if as_json:
        print_json({"folder": folder} | facts)
    with text_on_stderr(as_json):
        _print_facts(folder, facts)
    if facts["stopped"]:
        raise UserError(
            f"expected to finish all photos; stopped: {facts['stopped']}. The set holds the photos that are finished. "
            "To go on, run the same command: no answered question is asked again"
        )


def _print_facts(folder: Path, facts: dict[str, Any]) -> None:
    counts, photos = facts["counts"], facts["photos"]
    by_type = ", ".join(f"{kind} {count}" for kind, count in counts["rows_by_type"].items())
    out.print(f"{counts['rows']} edits of {counts['photos_with_rows']} photos: {by_type}")
    out.print(
        f"{counts['rejected']} edits rejected ({counts['rejected_share']:.1%}), {counts['not_offered']} not offered; "
        f"{photos['bad']} bad photos, {photos['duplicates']} near-duplicates; {facts['held_out']} rows held out"
    )
    print_usage(facts)
    out.print(f"Set: [bold]{escape(str(folder))}[/]. Train on it: {escape(train_command(folder))}")


def show_dry_run(job: Job, count: int) -> None:
    """Ask for a few photos; print each request and answer, and what all photos would take. The answers are kept."""
    from npedit.prepare.dry_run import dry_run
    from npedit.prepare.prepare import PrepareSettings

    settings = PrepareSettings(**job.settings)
    with progress_display(False, err) as report:
        found = dry_run(job.photos, job.target, settings, job.prompts, *job.models, job.meter, count, report)
    for exchange in found.exchanges:
        out.print(f"[bold]{escape(exchange.title)}[/]")
        out.print(escape(exchange.question), "", escape(exchange.answer), "", sep="\n")
    for line in found.summary_lines():
        out.print(escape(line))


def merge_shards(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="A new folder, for the set.")],
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD", help="Folders that prepare --shard i/n made.")],
    as_json: JsonOption = False,
) -> None:
    """Merge the shards that `npedit prepare --shard i/n` made into one set. No model is asked.

    npedit merge-shards set/ shard-0 shard-1 shard-2
    """
    from npedit.prepare.merge import merge

    print_summary(folder, merge(folder, shards), as_json)
