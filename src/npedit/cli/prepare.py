"""`npedit prepare`: from a folder of photos to a training set."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from npedit.cli.captions import run_captions
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.cli.local_page import PagePortOption
from npedit.cli.prepare_progress import progress_display
from npedit.cli.review import run_review
from npedit.cli.writers import (
    EngineOption,
    JpegQualityOption,
    ParametersOption,
    RayAddressOption,
    VerifierModelOption,
    VerifierOption,
    VerifyOption,
    WorkersOption,
    WriterModelOption,
    WriterOption,
    open_engine,
    open_models,
)
from npedit.errors import UserError, npedit_command

if TYPE_CHECKING:
    from npedit.prepare.prompts import Prompts

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

WordsArgument = Annotated[
    list[str], typer.Argument(metavar="PHOTOS", help="A folder of photos; with --merge: SET SHARD [SHARD]...")
]
FolderOption = Annotated[Path | None, typer.Option("--out", help="The set's folder. The same command resumes in it.")]
TypesOption = Annotated[
    str, typer.Option(help="Wanted edit types with shares: add=0.2,remove=0.3. If not given: ten types, equal.")
]
PerPhotoOption = Annotated[int, typer.Option(help="Wanted edits of each photo.", min=1, max=16)]
RoundsOption = Annotated[
    int, typer.Option(help="Rounds of asking. After the first, only photos that lack edits are asked.", min=1)
]
SideOption = Annotated[int, typer.Option(help="Longest side in pixels of the pictures that are sent.", min=16)]
LanguageOption = Annotated[str, typer.Option(help="Language of the instructions; captions are English.")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="A folder with look.yaml, write.yaml, verify.yaml in place of the package's.")
]
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
MaxCostOption = Annotated[float, typer.Option("--max-cost", help="Stop before this cost; needs prices.", min=0)]
PriceInOption = Annotated[float, typer.Option("--price-in", help="Of a million prompt tokens.", min=0)]
PriceOutOption = Annotated[float, typer.Option("--price-out", help="Of a million answer tokens.", min=0)]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="The same seed and answers give the same set.")]
ShardOption = Annotated[str, typer.Option(help="Work on part i of n of the photos, as i/n with i from 0.")]
CaptionsOption = Annotated[
    bool,
    typer.Option("--captions", help="PHOTOS is a set with instructions: fill the captions that its rows lack."),
]
MergeOption = Annotated[bool, typer.Option("--merge", help="Merge finished shards into one set.")]
ReviewOption = Annotated[
    bool, typer.Option("--review", help="PHOTOS is a set: open a page on which a person accepts, mends, rejects rows.")
]


def prepare(
    words: WordsArgument,
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
    merge: MergeOption = False,
    review: ReviewOption = False,
    port: PagePortOption = 7861,
    captions: CaptionsOption = False,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write a training set for a folder of photos: a vision-language model looks, writes edits, and verifies them.

    npedit prepare photos/ --out set/ --writer http://localhost:8000/v1 --writer-model NAME

    npedit prepare imported/ --captions --out set/ --writer http://localhost:8000/v1 --writer-model NAME

    Pictures are scaled down and stripped of EXIF and GPS data before they are sent. The same command resumes.
    """
    if review:
        others = options_given(out=folder, writer=writer, captions=captions, dry_run=dry_run, json=as_json, merge=merge)
        return run_review(words, others, port)
    if merge:
        return merge_shards(words, folder, writer, as_json)
    photos, target = check_options(words, folder, writer or [], duplicates, max_cost, price_in + price_out)
    loaded, shares, part = *load_wishes(prompts, custom, language, types), parse_shard(shard)
    served = (writer or [], writer_model, verifier or [], verifier_model)
    models = open_models(*served, verify, workers, jpeg_quality, parameters)
    job = Job(
        photos, target, loaded, models, open_engine(engine, ray_address, models), licences,
        (price_in, price_out, max_cost), {"shares": shares, "per_photo": per_photo, "side": side, "seed": seed,
        "rounds": rounds, "subjects": subjects, "duplicates": duplicates, "held_out": held_out, "shard": part},
    )  # fmt: skip
    return run(job, options_given(types=types, custom=custom, language=language, licences=licences, subjects=subjects,
                                  shard=shard, dry_run=dry_run), captions, dry_run, as_json)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One call of `npedit prepare`: `models` are (writer, verifier or None), `engine` None is the threads of this
    process, `prices` are (in, out, ceiling), `settings` are those of `PrepareSettings`."""

    photos: Path
    target: Path
    prompts: Prompts
    models: tuple[Any, Any]
    engine: Any
    licences: Path | None
    prices: tuple[float, float, float]
    settings: dict[str, Any]


def options_given(**options: Any) -> list[str]:
    """The names of the options, as on the command line, that are not empty."""
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value]


def run(job: Job, of_new_edits: Sequence[str], captions: bool, dry_run: int, as_json: bool) -> None:
    """Fill captions, try some photos, or make the set. `of_new_edits` are the options given that captions do not have.

    Raises:
        UserError: options that do not go together, or whatever stops the run.
    """
    if captions:
        run_captions(job, of_new_edits, lambda priced: progress_display(priced, err), as_json)
    elif dry_run and as_json:
        raise UserError("expected --json or --dry-run; got both: a dry run shows requests and answers; leave one out")
    elif dry_run:
        show_dry_run(job, dry_run)
    else:
        run_job(job, as_json)


def run_job(job: Job, as_json: bool = False) -> None:
    """Make the set and print what was made.

    Raises:
        UserError: bad input, a model that cannot be reached, or the cost ceiling.
    """
    from npedit.prepare.asking import Meter
    from npedit.prepare.photos import read_rights_table
    from npedit.prepare.prepare import PrepareSettings
    from npedit.prepare.prepare import prepare as make_set

    table = read_rights_table(job.licences) if job.licences else {}
    settings, meter = PrepareSettings(**job.settings), Meter(*job.prices)
    with progress_display(any(job.prices), err) as report:
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


def check_options(
    words: list[str], folder: Path | None, writers: list[str], duplicates: str, max_cost: float, prices: float
) -> tuple[Path, Path]:
    """(folder of photos, folder of the set).

    Raises:
        UserError: options are missing or do not go together.
    """
    if len(words) != 1:
        raise UserError(f"expected one folder of photos; got {len(words)}; put the others into sub-folders of one")
    if not folder:
        raise UserError("expected --out SET; got none; give a new folder")
    if not writers:
        raise UserError(
            "expected --writer; got none; give a server's address (http://localhost:8000/v1) with --writer-model, or "
            "the folder or Hub id of a vision-language model"
        )
    if duplicates not in ("one", "mark", "off"):
        raise UserError(f"--duplicates: expected one, mark or off; got {duplicates!r}")
    if max_cost and not prices:
        raise UserError("--max-cost: expected prices beside it; got none; add --price-in and --price-out")
    return Path(words[0]), folder


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of --shard i/n; (0, 1) of "".

    Raises:
        UserError: it is not of that form.
    """
    if not text:
        return 0, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard: expected i/n with i from 0 to n - 1; got {text!r}")
    return int(number), int(count)


def print_summary(folder: Path, facts: dict[str, Any], as_json: bool = False) -> None:
    """What was made, what it cost, and how to train on it; with `as_json` the facts as they are in prepare.json.

    Raises:
        UserError: the run stopped at the cost ceiling.
    """
    if as_json:
        print_json({"folder": folder} | facts)
    with text_on_stderr(as_json):
        _print_facts(folder, facts)
    if facts["stopped"]:
        raise UserError(
            f"expected to finish all photos; stopped: {facts['stopped']}. The set holds the photos that are finished. "
            "To go on, raise the ceiling and run the same command: no answered question is asked again"
        )


def _print_facts(folder: Path, facts: dict[str, Any]) -> None:
    counts, photos = facts["counts"], facts["photos"]
    by_type = ", ".join(f"{kind} {count}" for kind, count in counts["rows_by_type"].items())
    out.print(f"{counts['rows']} edits of {counts['photos_with_rows']} photos: {by_type}")
    out.print(
        f"{counts['rejected']} edits rejected ({counts['rejected_share']:.1%}), {counts['not_offered']} not offered; "
        f"{photos['bad']} bad photos, {photos['duplicates']} near-duplicates; {facts['held_out']} rows held out"
    )
    usage, cost = facts["usage"], facts["cost"]
    tokens = f"{usage.get('prompt_tokens', 0):,} prompt tokens, {usage.get('completion_tokens', 0):,} answer tokens"
    priced = f"; cost {cost:.4g}" if cost else ""
    out.print(f"{sum(facts['requests'].values())} requests in this run; of all answers {tokens}{priced}")
    held = f" data.held_out={shlex.quote(str(folder / 'held_out.txt'))}" if facts["held_out"] else ""
    out.print(
        f"Set: [bold]{escape(str(folder))}[/]. Train on it: {escape(npedit_command())} train RECIPE "
        f"data.path={escape(shlex.quote(str(folder)))}{escape(held)}"
    )


def show_dry_run(job: Job, count: int) -> None:
    """Ask for a few photos; print each request and answer, and what all photos would take. The answers are kept."""
    from npedit.prepare.asking import Meter
    from npedit.prepare.dry_run import dry_run
    from npedit.prepare.prepare import PrepareSettings

    settings, meter = PrepareSettings(**job.settings), Meter(*job.prices)
    with progress_display(False, err) as report:
        found = dry_run(job.photos, job.target, settings, job.prompts, *job.models, meter, count, report)
    for exchange in found.exchanges:
        out.print(f"[bold]{escape(exchange.title)}[/]")
        out.print(escape(exchange.question), "", escape(exchange.answer), "", sep="\n")
    for line in found.summary_lines():
        out.print(escape(line))


def merge_shards(words: list[str], folder: Path | None, writers: list[str] | None, as_json: bool = False) -> None:
    """Merge finished shards into one set: `words` are SET SHARD...

    Raises:
        UserError: --out or --writer is given, or there are too few words.
    """
    from npedit.prepare.merge import merge

    if folder or writers:
        raise UserError("--merge: expected SET SHARD... and no --out or --writer: no model is asked; leave them out")
    folders = [Path(word) for word in words]
    if len(folders) < 2:
        raise UserError("--merge: expected SET and at least one SHARD; got too few; npedit prepare --merge set s0 s1")
    facts = merge(folders[0], folders[1:])
    print_summary(folders[0], facts, as_json)
