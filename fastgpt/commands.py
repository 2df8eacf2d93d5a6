"""What each command does with its settings. Importing this needs no PyTorch: a command imports what it needs."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .config import DTYPES, ConfigError, GPTConfig
from .plan import Cluster, Job, Plan
from .settings import (
    BenchSettings,
    CompareSettings,
    DataPrepareSettings,
    DataShowSettings,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    ParitySettings,
    PlanSettings,
    SampleSettings,
    ServeSettings,
    TrainSettings,
    UsageError,
    check_export_format,
    check_tokenizer,
    check_vocab_size,
    flag,
)
from .studies.settings import STUDIES, LearnSettings, StudySettings

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .data.corpus import Corpus
    from .tokenizer import Tokenizer
    from .training.loop import Trainer
    from .training.processes import Processes

_EXAMPLES = {
    "checkpoint": "the folder of a run, which fastgpt train makes",
    "runs": "the folders of runs, as in fastgpt compare runs/first runs/second",
    "data": "a text file, or shakespeare",
    "out": "a folder for the run, as runs/first",
    "export out": "a folder for the model, as models/first",
    "data prepare data": "text files, folders of them, JSON lines or Parquet",
    "data prepare out": "a folder for the tokens, as data/prepared",
}


def _required(settings: Any, command: str) -> list[Any]:
    """The values of the settings that the command needs."""
    names = type(settings).REQUIRED
    for name in names:
        if getattr(settings, name) in (None, ()):
            resumes = getattr(settings, "resume", False)
            what = (
                "the folder of the run to go on with"
                if resumes
                else _EXAMPLES.get(f"{command} {name}", _EXAMPLES[name])
            )
            raise UsageError(f"--{name} is missing: give {what}; see fastgpt {command} --help")
    return [getattr(settings, name) for name in names]


def _on_backend(name: str, device: str) -> contextlib.AbstractContextManager:
    """Ops prefer the backend called `name`; with "auto" the environment's FASTGPT_BACKEND still counts.

    Refuses one that can serve nothing on `device`, before anything is read.
    """
    from .machine import resolve_device
    from .ops.backend import check_preference, use_backend

    source = "FASTGPT_BACKEND" if name == "auto" else "--backend"
    check_preference(_backend(name), source, resolve_device(device).type)
    return contextlib.nullcontext() if name == "auto" else use_backend(name)


def _backend(name: str) -> str:
    """The backend that --backend `name` prefers: with "auto" the environment's."""
    from .ops.backend import preferred

    return preferred() if name == "auto" else name


def _initial(settings: TrainSettings) -> tuple[Any, Any, TrainSettings]:
    """The model that --init-from names, its tokenizer, and the settings that it completes."""
    from .training.initial import initial_model

    assert settings.init_from is not None
    if settings.data is None:  # the default text is probably what it has been trained on
        raise UsageError("--data is missing: say what the model shall learn now, a file, a folder, or a text's name")
    try:
        model, tokenizer = initial_model(settings.init_from, settings.asked_of_the_start())
    except ConfigError as error:
        raise UsageError(_naming_option(error, settings)) from None
    completed = settings.with_start(model.kind, tokenizer.kind, model.layout, model.cfg)
    if settings.layout != completed.layout != TrainSettings.layout:
        print(f"layout: {completed.layout}, that of the model's data; --layout {TrainSettings.layout} takes plain text")
    if settings.lr is None:
        print(f"lr: {completed.lr:g}, which follows from the model's width of {model.cfg.n_embd}")
    return model, tokenizer, completed


def train(settings: TrainSettings) -> None:
    (out,) = _required(settings, "train")
    has_start = bool(settings.init_from) and not settings.resume
    if not has_start:
        _check_model(settings)  # before PyTorch is imported

    from .training.processes import joined

    with joined(settings.device) as processes:
        initial: Any = None
        tokenizer: Any = settings.tokenizer
        if has_start:
            initial, tokenizer, settings = _initial(settings)
            _check_model(settings)
        _train(settings, out, initial, tokenizer, processes)


def _check_model(settings: TrainSettings) -> None:
    """Refuse a model, a way of training, or a tokenizer that cannot be, before the data is read."""
    settings.train_config(), settings.model_config(vocab_size=1)
    check_tokenizer(settings)


def _train(settings: TrainSettings, out: str, initial: Any, tokenizer: Any, processes: Processes) -> None:
    """Train in this process, which may be one of several."""
    import torch

    from .training import runs
    from .training.processes import HOW_TO_START

    _check_processes(settings, processes)
    on_backend = _on_backend(settings.backend, settings.device)
    if advice := settings.rate_of_another_optimizer():
        print(advice)
    if processes.size == 1 and settings.parallel != "auto":
        print(f"parallel: {settings.parallel} is for several processes, and this is the only one; {HOW_TO_START}")
    restarted = processes.has_begun(out)
    saved = runs.load_latest(out) if settings.resume or (restarted and runs.can_resume(out)) else None
    processes.check_same({"out": None if saved is None else str(saved.path)})
    corpus = _corpus(settings, saved, tokenizer, processes)
    vocab_size = corpus.tokenizer.vocab_size
    if initial is not None:  # which may have more than its tokenizer needs
        vocab_size = initial.cfg.vocab_size
    elif saved is not None:
        vocab_size = saved.config().vocab_size
    recorded = settings.recorded() | {"threads": torch.get_num_threads()}  # of which some sums depend in their bits
    if processes.size > 1:  # they share the cores of a machine, and a run goes on in another number of them
        del recorded["threads"]
    run: dict[str, Any] = {
        "kind": settings.model,
        "config": settings.model_config(vocab_size),
        "train_config": settings.train_config(),
        "corpus": corpus,
        "settings": recorded,
        "resume_command": f"{_program(processes)} train --out {shlex.quote(out)} --resume",
        "processes": processes,
    }
    with on_backend:
        if saved is not None:
            trainer = runs.resume(out, saved, **run)
        else:
            trainer = runs.start(out, **run, initial=initial, again=restarted)
        processes.note_begun(out)
        if restarted:
            print(f"torchrun has started the processes again: the run goes on from step {trainer.state['step']}")
        _run_to_the_end(trainer, settings, out)


def _check_processes(settings: TrainSettings, processes: Processes) -> None:
    """Refuse what these processes cannot do, and processes that were asked for different things."""
    from .baselines import model_class
    from .cuda_graph import recorder
    from .machine import resolve_device
    from .training.graph import is_graphed
    from .training.parallel import check_parallel
    from .training.step import Precision, check_checkpointing

    train_config = settings.train_config()
    processes.check_same({**settings.recorded(), "backend": _backend(settings.backend)})
    processes.rows(train_config.batch_size)
    check_checkpointing(model_class(settings.model), train_config)
    device = resolve_device(train_config.device)
    check_parallel(train_config, processes, Precision(device, train_config.dtype))
    if is_graphed(train_config, device.type, processes) and train_config.cuda_graph:
        recorder(device)


def _corpus(settings: TrainSettings, saved: Checkpoint | None, tokenizer: Any, processes: Processes) -> Corpus:
    """The data by the tokenizer of the run so far, or by `tokenizer`: its name, its folder, or itself."""
    from .data.corpus import Corpus
    from .data.stored import is_stored
    from .tokenizer_files import read_tokenizer

    if saved is not None:
        tokenizer = saved.read_tokenizer()
    elif isinstance(tokenizer, str) and tokenizer not in ("char", "bpe"):
        tokenizer = read_tokenizer(tokenizer)
    with processes.in_turn():
        corpus = Corpus.load(
            settings.data,
            tokenizer,
            vocab_size=settings.vocab_size,
            block_size=settings.block_size,
            layout=settings.layout,
        )
    processes.check_same({"data": corpus.fingerprint})
    if tokenizer == "bpe":
        _say_another_size(corpus.tokenizer, settings.vocab_size, is_stored(settings.data))
    return corpus


def _say_another_size(bpe: Tokenizer, asked: int | None, is_stored: bool = False) -> None:
    """Tell why a BPE has not as many tokens as were asked for. One for documents has another one, which ends them."""
    if asked is None or asked <= bpe.vocab_size <= asked + (bpe.end_of_text is not None):
        return
    why = "those of the folder of tokens" if is_stored else "no further pair occurs twice in the text"
    print(f"vocab_size: {bpe.vocab_size} tokens, not {asked}: {why}")


def _run_to_the_end(trainer: Trainer, settings: TrainSettings, out: str) -> None:
    """Train to the end, and say what is trained and how it ended."""
    from .training.loggers import Loggers, opened
    from .training.muon import who_trains
    from .training.profile import StepProfile
    from .training.progress import first_lines

    if (reached := trainer.finished()) is not None:
        print(f"the run in {out} is finished: {reached}")
        return
    print(*first_lines(trainer, settings.origin(trainer.device.type), settings.data), sep="\n", flush=True)
    if trainer.cfg.optimizer == "muon":
        print(f"optimizer: {who_trains(trainer.optimizer)}", flush=True)
    step, is_first = trainer.state["step"], trainer.processes.is_first
    if settings.profile and is_first:
        trainer.profile = StepProfile(trainer.folder.path, trainer.device, step, trainer.cfg.max_steps)
    with opened(settings.log, trainer.folder, settings.recorded(), step) if is_first else Loggers() as trainer.loggers:
        state = trainer.run()
        end = f"best val loss {state['best_val']:.4f}, {state['elapsed_s']:.1f} s of training"
        print(f"done: step {state['step']}, {end}", flush=True)


def _program(processes: Processes) -> str:
    """How so many processes of this program are started."""
    if processes.size == 1:
        return "fastgpt"
    if os.environ.get("LOCAL_WORLD_SIZE", str(processes.size)) != str(processes.size):  # on several machines
        return "torchrun [its options, as before] -m fastgpt"
    return f"torchrun --nproc-per-node {processes.size} -m fastgpt"


def sample(settings: SampleSettings) -> None:
    (checkpoint,) = _required(settings, "sample")
    for name in ("prompt", "stop"):
        if "" in _texts(getattr(settings, name)):
            raise UsageError(f"--{name}: is empty; give at least one character")
    on_backend = _on_backend(settings.backend, settings.device)
    import torch

    from .generate_text import stream_text
    from .loading import load
    from .machine import resolve_device

    model, tokenizer = load(checkpoint, dropout=0.0)
    if settings.prompt == SampleSettings.prompt:
        _check_default_prompt(model.layout, tokenizer)
    device = resolve_device(settings.device)
    model.to(device)
    generator = torch.Generator(device)
    generator.manual_seed(settings.seed) if settings.seed is not None else generator.seed()
    options: dict[str, Any] = {"layout": model.layout, "device": device, "generator": generator}
    for name in ("num_samples", "stop", "temperature", "top_k", "top_p", "repetition_penalty", "stride"):
        options[name] = getattr(settings, name)
    if settings.cuda_graph:
        options["cuda_graph"] = True
    with on_backend:
        try:
            pieces = stream_text(model, tokenizer, settings.prompt, settings.max_new_tokens, **options)
        except ValueError as error:  # a setting that it cannot have
            raise UsageError(_naming_option(error, settings)) from None
        _print_samples(pieces, [text for text in _texts(settings.prompt) for _ in range(settings.num_samples)])


def _texts(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def _check_default_prompt(layout: str, tokenizer: Any) -> None:
    """Refuse a model that cannot go on from the prompt that is taken where none is given."""
    if layout == "completions":
        raise UsageError("--prompt is missing: this model completes prompts; give one like those of its data")
    try:
        tokenizer.encode(SampleSettings.prompt)
    except ValueError:
        raise UsageError("--prompt is missing: the text that the model knows has no line's end to begin with") from None


def _naming_option(error: ValueError, settings: Any) -> str:
    """The text of an error that begins with an argument's name, with the name of the option in its place."""
    name, colon, rest = str(error).partition(": ")
    return f"{flag(name)}{colon}{rest}" if name in vars(settings) else str(error)


def _print_samples(pieces: Iterator[tuple[int, str]], waiting: list[str]) -> None:
    """Print the first sample while it is drawn; the others are drawn beside it, and wait until it is complete.

    waiting: the text of each sample so far, which is its prompt.
    """
    n = len(waiting)
    for number in range(n):
        if n > 1:
            print(f"--- sample {number + 1} of {n} ---")
        print(waiting[number], end="", flush=True)
        for of, text in pieces:  # all of them come while the first sample is printed
            if of == number:
                print(text, end="", flush=True)
            else:
                waiting[of] += text
        print()


def serve(settings: ServeSettings) -> None:
    _required(settings, "serve")
    for name, least, most in (
        ("port", 0, 65535),
        ("max_batch", 1, 1024),
        ("max_queue", 0, 65536),
        ("max_new_tokens", 1, None),
        ("stride", 1, None),
    ):
        value = getattr(settings, name)
        if value is not None and (value < least or (most is not None and value > most)):
            bound = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise UsageError(f"{flag(name)}: expected an integer {bound}, got {value}")
    if not 0 < settings.timeout < float("inf"):
        raise UsageError(f"--timeout: expected a number of seconds above 0, got {settings.timeout}")
    for name in ("host", "token", "name"):
        if getattr(settings, name) == "":
            raise UsageError(f"--{name}: is empty")
    on_backend = _on_backend(settings.backend, settings.device)
    from .machine import resolve_device
    from .serve.run import serve as run

    run(settings, resolve_device(settings.device), on_backend)


def evaluate(settings: EvalSettings) -> None:
    checkpoint, data = _required(settings, "eval")
    if settings.dtype not in DTYPES:
        raise UsageError(f"--dtype: expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    on_backend = _on_backend(settings.backend, settings.device)
    import json

    from .evaluate import evaluate, examples_of, results, table
    from .loading import load
    from .machine import resolve_device
    from .training.step import Precision

    model, tokenizer = load(checkpoint, dropout=0.0)
    try:
        examples = examples_of(model, tokenizer, data, settings.stride)
    except ConfigError as error:
        raise UsageError(_naming_option(error, settings)) from None
    precision = Precision(resolve_device(settings.device), settings.dtype)
    model.to(precision.device)
    with on_backend:
        found = results(evaluate(model, tokenizer, examples, precision), model, examples)
    found = {"checkpoint": checkpoint, "data": data, **found}
    found |= {"device": str(precision.device), "dtype": precision.name}
    print(json.dumps(found, indent=2) if settings.json else table(found))


def export(settings: ExportSettings) -> None:
    checkpoint, out = _required(settings, "export")
    try:
        check_export_format(settings.format)
    except (ConfigError, ImportError) as error:
        raise UsageError(f"--{error}") from None
    for name in ("config.json", "model.safetensors", "config.toml", "checkpoint"):
        if os.path.exists(os.path.join(out, name)):
            raise UsageError(f"--out: {out} already holds a model or a run; give another folder")
    from .exporting import check_model, write
    from .files import expand_path, new_folder
    from .loading import load

    with new_folder(expand_path(out)) as folder:  # which is found now, and not after the work, where it cannot be made
        model, _ = load(checkpoint)
        try:
            check_model(model, settings.format)
        except ValueError as error:
            raise UsageError(f"--checkpoint: {checkpoint} {str(error).removeprefix('model: ')}") from None
        try:
            found = write(model, folder, settings.format)
        except ValueError as error:  # GPT-2 has not all settings
            raise UsageError(_naming_option(error, settings)) from None
    print(f"{out}: a model ({model.kind}) of {model.num_parameters():,} parameters, in the format {settings.format}")
    print(found or "not compared with the model: transformers, which reads this format, is not installed")


def compare(settings: CompareSettings) -> None:
    (runs,) = _required(settings, "compare")
    from .compare import compare

    print(compare(runs, settings.out))


def data_show(settings: DataShowSettings) -> None:
    from .data.show import show_layouts

    print(show_layouts(settings.data, settings.layout, settings.block_size, settings.tokenizer, settings.seed))


def data_prepare(settings: DataPrepareSettings) -> None:
    data, out = _required(settings, "data prepare")
    check_vocab_size(settings)
    if settings.processes is not None and settings.processes < 1:
        raise UsageError(f"--processes: expected at least 1, got {settings.processes}")
    from .data.prepare import prepare
    from .data.prepared import is_prepared
    from .files import expand_path
    from .threads import available_cores
    from .tokenizer_files import read_tokenizer

    folder = expand_path(out)
    was_prepared = is_prepared(folder)
    named = settings.tokenizer in ("char", "bpe")
    tokenizer = settings.tokenizer if named else read_tokenizer(settings.tokenizer)
    processes = settings.processes or available_cores()
    found = prepare(data, tokenizer, folder, vocab_size=settings.vocab_size, field=settings.field, processes=processes)
    if settings.tokenizer == "bpe":
        _say_another_size(found.tokenizer, settings.vocab_size)
    if was_prepared:
        print(f"{out} was prepared already, and all of its shards are whole")
    sizes = f"{len(found.train):,} tokens to train on and {len(found.val):,} to validate"
    print(f"{out}: {sizes}, vocabulary of {found.tokenizer.vocab_size:,} ({found.tokenizer.kind})")
    print(f"next: fastgpt train --data {shlex.quote(out)} --out runs/NAME")


def plan(settings: PlanSettings) -> None:
    try:
        found = Plan(settings.part(GPTConfig), settings.part(Job), settings.part(Cluster))
    except ConfigError as error:
        raise UsageError(_naming_option(error, settings)) from None
    if settings.json:
        import json

        print(json.dumps(found.to_json(), indent=2))
    else:
        print(found)


def learn(settings: LearnSettings) -> None:
    from .studies.learn import run

    with _on_backend("auto", settings.device):
        run(settings)


def study(settings: StudySettings) -> None:
    from .studies import run

    (name,) = (name for name, kind in STUDIES.items() if kind is type(settings))
    with _on_backend("auto", settings.device):
        run(name, settings)


def doctor(settings: DoctorSettings) -> None:
    from .doctor import report

    print(report(settings.self_test, settings.backend))


def parity(settings: ParitySettings) -> int:
    from .parity.report import main as run

    return run(settings.device, settings.out, settings.only)


def bench(settings: BenchSettings) -> int:
    try:
        from .benchmarks import command
    except ModuleNotFoundError as error:
        if error.name != "fastgpt.benchmarks":
            raise
        raise ImportError("this source tree is not installed; run pip install -e . in it") from None

    if settings.report:
        for name in ("only", "quick", "nanogpt", "lecture", "data"):
            if getattr(settings, name):
                raise UsageError(f"--{name}: is for measuring; leave it out, or --report")
        command.write_report(settings.results, settings.out)
        return 0
    if settings.results:
        raise UsageError("--results: is what --report reads; add --report, or name a file to write to with --out")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device: expected auto, cpu or cuda, got {settings.device!r}")
    for name in settings.only:
        if name not in command.benchmark_names():
            there = ", ".join(command.benchmark_names())
            raise UsageError(f"--only: there is no benchmarks/bench_{name}.py; there are {there}")
    for name in ("nanogpt", "lecture"):
        if (path := getattr(settings, name)) is not None and not os.path.exists(path):
            raise UsageError(f"--{name}: {path} does not exist; give what --help names, or leave it out")
    paths = {name: getattr(settings, name) for name in ("nanogpt", "lecture", "data")}
    return command.run_suite(settings.only, settings.device, settings.out, settings.quick, paths)
