"""The one configuration tree: YAML in, dotted overrides on top, a frozen validated object out.

Nothing else in the project reads settings from anywhere. Unknown keys are errors that name the key and the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

PACKAGE_ROOT = Path(__file__).parent
TINY_BASE = PACKAGE_ROOT / "tiny" / "base"

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Grader = Literal["none", "arithmetic", "gsm8k", "math", "code"]
Template = Literal["auto", "chat", "plain"]
Task = Literal["held_out", "gsm8k", "math", "humaneval", "mbpp"]
T = TypeVar("T")


def _at_home(path: str) -> str:
    """``path`` with a leading ``~`` or ``~name`` replaced, as the shell does only where it sees it."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(f"nobody's home directory is {path.split('/')[0]}: write the whole path") from error


Place = Annotated[str, AfterValidator(_at_home)]
"""A local path, a URL, or a name on a hub."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what to do."""


def _of_round(values: tuple[T, ...], round_number: int) -> T:
    """The value of round ``round_number`` (from 1); the last one serves all later rounds."""
    return values[min(round_number, len(values)) - 1]


class Section(BaseModel):
    """A frozen part of the tree that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: Place = "tiny"
    """Base model: a Hugging Face id, a local directory, or ``tiny`` for the model shipped with the project."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the weights are computed in when collecting, training and evaluating."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """Backend for the stem-and-branches attention; ``auto`` picks by device and what is installed."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Leave off unless you have read that code."""

    @property
    def base(self) -> str:
        """Where transformers loads the base model from."""
        return str(TINY_BASE) if self.path == "tiny" else self.path


class PromptsConfig(Section):
    """Where prompts come from and how many are needed; [what a row is](tutorial.md#8-your-data-your-grader).

    One of 16 distinct texts is held out for evaluation, by a digest of the text. With ``fresh`` a run needs
    (``rounds`` + 1) times ``per_round`` of the others, since the last model collects too (``collect.after_last``);
    without it ``per_round``. So the source needs about 16/15 of that in distinct texts, and at least 16 times
    ``held_out``, whichever is more, and a few percent to spare, because the digest decides. Too few are refused before
    anything starts.
    """

    source: Place = "tiny"
    """``tiny`` (generated word problems), a local .json/.jsonl/.parquet file, or a Hugging Face data set id."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    column: str = "question"
    """Column that holds the prompt: a text, or a list of messages with ``role`` and ``content``."""
    answer_column: str | None = None
    """Column that holds the reference answer, where a grader needs one."""
    template: Template = "auto"
    """Wrap prompts in the model's chat template (``auto``: where the tokenizer has one)."""
    per_round: Positive = 1000
    """Prompts decoded in each round."""
    fresh: bool = True
    """Give every round prompts of its own instead of the first round's again."""
    held_out: Positive = 400
    """Prompts kept aside for evaluation, never used for training; ``evaluate.prompts`` may not be more."""
    grader: Grader = "none"
    """How a response is judged right or wrong: by its number, its mathematical expression, or by running its code."""


class CollectConfig(Section):
    workers: Positive = 2
    """Ray actors that decode prompts."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray sets aside for each."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray sets aside for each; 0 computes on the CPU."""
    batch_prompts: Positive = 64
    """Prompts one actor decodes together; also the unit of retry."""
    batch_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A batch that takes longer is taken from its worker and redone by another."""
    max_attempts: Positive = 3
    """Times a prompt that takes its worker down is tried before it is rejected."""
    max_new_tokens: Positive = 256
    """Longest response; a longer one is cut and marked unfinished."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 is greedy; above 0 keyed Gumbel noise makes the responses exact samples."""
    responses: Literal["base", "self", "verified"] = "base"
    """Who writes the responses the trajectories lead to (docs/paper.md, "Whose responses")."""
    generator: Literal["builtin", "vllm"] = "builtin"
    """What the base writes responses with: this project's decoder, or vLLM (a GPU, greedy, the ``vllm`` extra)."""
    block_size: Annotated[tuple[Positive, ...], Field(min_length=1)] = (16,)
    """Block size n of every round, or one for each round; the last one serves all later rounds."""
    forward_tokens: Positive = 2048
    """Most tokens in one forward pass while trajectories are iterated; a GPU wants tens of thousands."""
    after_last: bool = True
    """Collect once more with the last model: its iterations per block are then known, and one round more can follow."""
    shard_bytes: Positive = 64 * 1024 * 1024
    """A shard is closed when it holds about this many bytes."""
    commit_every_s: Annotated[float, Field(ge=0)] = 30.0
    """Longest time finished trajectories wait in a worker before they are written to disk."""

    # Kept as a tuple, so that 16 and [16] are the same settings when a run is resumed.
    @field_validator("block_size", mode="before", json_schema_input_type=Positive | tuple[Positive, ...])
    @classmethod
    def _of_every_round(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _written_by_vllm(self) -> CollectConfig:
        if self.generator == "vllm":
            if self.responses != "base":
                raise ValueError(
                    f"generator=vllm writes the base's responses only, and responses is {self.responses!r}: the newest "
                    "model writes its own while it iterates; set responses=base or generator=builtin"
                )
            if self.temperature > 0:
                raise ValueError("generator=vllm writes greedily: set temperature=0 or generator=builtin")
            if self.gpus_per_worker == 0:
                raise ValueError("generator=vllm needs a GPU: set gpus_per_worker=1 or generator=builtin")
        return self

    def block_size_of(self, round_number: int) -> int:
        """Block size of round ``round_number`` (from 1)."""
        return _of_round(self.block_size, round_number)


class NoiseConfig(Section):
    schedule: Literal["progressive", "reverse", "random", "constant"] = "progressive"
    """How the noise ratio aimed at changes from block to block of a window."""
    t_min: Fraction = 0.0
    """Lowest noise ratio aimed at."""
    t_max: Fraction = 1.0
    """Highest noise ratio aimed at."""
    window: Annotated[int, Field(ge=0)] = 16
    """Blocks per window; 1 is clean context, 0 is one window over the whole response."""
    draws: Positive = 1
    """Noisy branches drawn per window; several share one clean stream."""

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must not exceed t_max ({self.t_max})")
        return self


class ZeroConfig(Section):
    offload: Literal["none", "optimizer", "all"] = "none"
    """What ZeRO-3 keeps in host memory: nothing, optimizer states, or optimizer states and parameters."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Parameters with fewer elements stay whole on every rank."""


class LoraConfig(Section):
    """Low-rank adapters are trained instead of all weights. Without this section, all weights are.

    The export has the adapters merged, so it is a plain model again.
    """

    rank: Positive = 16
    """Inner dimension of an adapter."""
    alpha: Rate = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of an adapter's inputs dropped while training."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear layers that get adapters, or all of them but the output head, which can have none."""

    @field_validator("target_modules")
    @classmethod
    def _without_ends(cls, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if ends := {"lm_head", "embed_tokens"} & {name.rpartition(".")[2] for name in names}:
            raise ValueError(f"{', '.join(sorted(ends))} cannot have adapters: embedding and head stay as they are")
        return names


class GuardConfig(Section):
    """When a step counts as spoilt, so that training goes back to the last checkpoint and leaves its data out."""

    norm_factor: Annotated[float, Field(gt=1.0)] = 300.0
    """A gradient norm more than this many times the median of the last 50 steps has exploded."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """Times a round may go back; one more and it fails, since the cause is then not in the data."""


class TrainConfig(Section):
    workers: Positive = 2
    """ZeRO-3 ranks."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray sets aside for each."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    """GPUs that Ray sets aside for each; 0 computes on the CPU."""
    steps: Positive = 300
    """Optimizer steps per round."""
    learning_rate: Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] = 1e-6
    """Peak rate of every round, or one for each round; the last one serves all later rounds."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up; to zero unless constant."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps in which the rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Longest gradient, as its norm over all parameters."""
    ar_weight: Weight | Annotated[tuple[Weight, ...], Field(min_length=1)] = 10.0
    """Weight of the next-token loss beside the consistency loss, one for all rounds or one for each, like the rates."""
    micro_batch_tokens: Positive = 4096
    """Token budget (clean and noisy) of one packed micro-batch; no sample is cut."""
    replay_rounds: Annotated[int, Field(ge=0)] = 0
    """Earlier rounds whose trajectories are trained on again, mixed with the round's own: more prompts at no cost."""
    packing_rows: Positive = 1024
    """Samples packed together, in training order; in pipelined rounds training begins when so many are collected."""
    micro_batches_per_step: Positive = 2
    """Micro-batches of all ranks together in one optimizer step; must be a multiple of ``workers``."""
    loss_chunk_tokens: Positive = 1024
    """Positions whose vocabulary-sized logits exist at the same time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    lora: LoraConfig | None = None
    """Train adapters only; null trains all weights."""
    guard: GuardConfig = GuardConfig()
    checkpoint_every_steps: Positive = 100
    """Steps between checkpoints."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 0.0
    """Save too when this long has passed since the last checkpoint; 0 is off."""
    checkpoint_async: bool = False
    """Write checkpoints from a process beside each rank (DeepSpeed's decoupled writer) while the next step goes on."""
    keep_checkpoints: Positive = 2
    """The last so many are kept, and the one with the lowest loss beside them."""
    export: Literal["last", "best"] = "last"
    """Publish the weights of the last step, or of the checkpoint whose steps before it had the lowest mean loss."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times the group of workers is restarted from the last checkpoint after a failure, until there is a newer one."""
    zero: ZeroConfig = ZeroConfig()

    def of_round(self, round_number: int) -> TrainConfig:
        """These settings with the values of round ``round_number`` (from 1) where there is one for each."""
        by_round = {"learning_rate": self.learning_rate, "ar_weight": self.ar_weight}
        values = {n: _of_round(v, round_number) if isinstance(v, tuple) else v for n, v in by_round.items()}
        return self.model_copy(update=values)

    def replayed(self, round_number: int) -> range:
        """Earlier rounds that round ``round_number`` (from 1) trains on again."""
        return range(max(1, round_number - self.replay_rounds), round_number)

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.micro_batches_per_step % self.workers:
            raise ValueError(
                f"micro_batches_per_step ({self.micro_batches_per_step}) must be a multiple of workers ({self.workers})"
            )
        return self


class DecodingConfig(Section):
    block_size: Positive = 32
    """Draft length n."""
    blocks: Positive = 2
    """Blocks in flight, K, of multi-block decoding."""
    spawn_ratio: Fraction = 0.85
    """Share r of the real-active block that must be accepted before the next block starts."""
    pool: Annotated[int, Field(ge=0)] = 4
    """Candidate n-grams of rejection recycling verified beside the draft; 0 turns recycling off."""


class EvaluateConfig(Section):
    task: Task = "held_out"
    """``held_out``: prompts kept aside, judged by ``prompts.grader``; else a benchmark with a grader of its own."""
    source: Place | None = None
    """The benchmark's rows, a local file or a Hugging Face data set id; default its home on the hub."""
    subset: str | None = None
    """Configuration name of that data set."""
    split: str | None = None
    """Split of that data set; default ``test``."""
    prompts: Positive = 400
    """Most prompts decoded: the first ones, autoregressively and in mode ``jacobi``."""
    multiblock_prompts: Positive | None = None
    """Of these, the first so many are decoded in mode ``multiblock`` too, and their iterations counted; default all.

    On a CPU that is most of an evaluation: its forwards are the longest."""
    speed_prompts: Positive = 24
    """Prompts decoded one at a time, all modes in alternation, for tokens per second."""
    batch_prompts: Positive = 64
    """Prompts one worker decodes together for accuracy."""
    max_new_tokens: Positive = 256
    """Longest response."""
    decoding: DecodingConfig = DecodingConfig()
    max_accuracy_drop: Fraction = 0.02
    """A round that loses more accuracy than this against the base model has failed and never becomes champion."""


class SandboxConfig(Section):
    """How code that a model wrote is run; only graders that run code read it."""

    isolation: Literal["namespaces", "limits"] = "namespaces"
    """``limits``: for root where namespaces are not allowed; such code can reach the network and public files."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Wall clock, and CPU time of each process."""
    memory_bytes: Positive = 1 << 30
    """Address space of each process."""
    processes: Positive = 8
    """Processes and threads at a time."""
    file_bytes: Positive = 16 << 20
    """Size of a file; all files together may have twice as much."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking URI; default ``MLFLOW_TRACKING_URI``, else an SQLite file under ``runs_dir``. A password in it is
    used and not recorded."""
    experiment: str | None = None
    """Experiment name; default ``jacobi-forcing/<name>``."""
    registered_model: str | None = None
    """Name of the models in MLflow's registry; default the experiment's with ``-`` for ``/``."""

    @field_validator("experiment")
    @classmethod
    def _stays_inside(cls, value: str | None) -> str | None:
        if value is not None and (".." in value.split("/") or "\\" in value or not value.isprintable()):
            raise ValueError("it names a folder under runs_dir too: leave out '..', backslashes and control characters")
        return value


class Config(Section):
    """Everything a run depends on."""

    name: str = "tiny"
    """Name of the run and of its folder under ``runs_dir``."""
    runs_dir: Path = Path("runs")
    """Where runs are kept; a relative path is taken from the directory the run was started in."""
    store: Place | None = None
    """Trajectory store: a local path or an object-store URL; default ``<runs_dir>/<name>/store``. A key in it is used
    and not recorded."""
    rounds: Positive = 3
    """Rounds of collecting, training, exporting and evaluating."""
    overlap: Literal["alternate", "pipelined"] = "alternate"
    """``alternate``: collecting and training use the same machines in turn; each frees all memory before the next
    starts. ``pipelined``: a round is trained on while it is collected, on machines for both at once; collectors stay
    and take over each new model in place. The results are the same."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides prompts, initial guesses, noise, sampling and the order of the samples."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    collect: CollectConfig = CollectConfig()
    noise: NoiseConfig = NoiseConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sandbox: SandboxConfig = SandboxConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError(
                f"{value!r} must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
            )
        return value

    @field_validator("runs_dir", mode="before")
    @classmethod
    def _local(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if "://" in value:
            raise ValueError("only store may be a URL: models and checkpoints need a folder that every machine sees")
        return _at_home(value)

    @property
    def run_dir(self) -> Path:
        return (self.runs_dir / self.name).absolute()

    @property
    def store_url(self) -> str:
        return self.store or str(self.run_dir / "store")

    def needs(self, each: Literal["cpus_per_worker", "gpus_per_worker"]) -> float:
        """CPU cores or GPUs that the workers of all stages running at the same time hold together."""
        collecting = self.collect.workers * float(getattr(self.collect, each))
        training = self.train.workers * float(getattr(self.train, each))
        return collecting + training if self.overlap == "pipelined" else max(collecting, training)

    @property
    def collections(self) -> int:
        """Rounds that are collected by the time the run is done."""
        return self.rounds + self.collect.after_last

    def model_dir(self, round_number: int) -> str:
        """Where model ``round_number`` is loaded from; model 0 is the base."""
        return self.model.base if round_number == 0 else str(self.run_dir / "models" / f"round-{round_number:03d}")

    def newest_model(self) -> int:
        """The last round that has a model; 0, the base, where none has."""
        folders = (self.run_dir / "models").glob("round-*")
        return max((int(m[1]) for f in folders if (m := re.fullmatch(r"round-(\d{3,})", f.name))), default=0)

    def anchored(self, home: Path) -> Config:
        """Give the same configuration with relative paths made absolute, so that it means the same in every process.

        What is written is taken from ``home``. So is what is read, where it is there: the current directory, which
        comes next, may be Ray's copy of it, with another name after every edit.
        """

        def found(path: str) -> str:
            places = (home / path, Path(path).absolute())
            return next((str(place) for place in places if place.exists()), path)

        store = self.store if self.store is None or "://" in self.store else str(home / self.store)
        return self.model_copy(
            update={
                "runs_dir": home / self.runs_dir,
                "store": store,
                "model": self.model.model_copy(
                    update={"path": self.model.path if self.model.path == "tiny" else found(self.model.path)}
                ),
                "evaluate": self.evaluate.model_copy(
                    update={"source": self.evaluate.source and found(self.evaluate.source)}
                ),
                "prompts": self.prompts.model_copy(
                    update={
                        "source": self.prompts.source if self.prompts.source == "tiny" else found(self.prompts.source)
                    }
                ),
            }
        )

    def shown(self) -> dict[str, object]:
        """All settings as plain values that may be recorded and shown: URLs are without what gives access."""
        return {name: _without_secrets(part) for name, part in self.model_dump(mode="json").items()}

    def to_yaml(self) -> str:
        """The settings of :meth:`shown`, as a file that can be loaded again."""
        return OmegaConf.to_yaml(OmegaConf.create(self.shown()))


def _without_secrets(tree: object) -> object:
    from trajectory_store import without_secrets  # late: with pyarrow, it would double the time of --help

    if isinstance(tree, dict):
        return {key: _without_secrets(part) for key, part in tree.items()}
    if isinstance(tree, list):
        return [_without_secrets(part) for part in tree]
    return without_secrets(tree) if isinstance(tree, str) else tree


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, put ``key.sub=value`` overrides on top and validate.

    Raises:
        ConfigError: no such file, not YAML of keys and values, an unknown key, or a value that does not fit; the
            message names which.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; the shipped ones are in configs/")
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r} is not of the form key.sub=value")
    try:
        settings = OmegaConf.load(path)
        if isinstance(settings, ListConfig):
            raise ConfigError(
                f"{path} holds a list; a configuration is keys with their values, as in configs/tiny.yaml"
            )
        tree = OmegaConf.merge(settings, OmegaConf.from_dotlist(list(overrides)))
        return Config.model_validate(OmegaConf.to_container(tree, resolve=True))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {_reason(e)}" for e in error.errors()]
        raise ConfigError(
            "\n".join([f"{path} with {len(overrides)} override(s) is not a valid configuration:", *lines])
        ) from None
    except TypeError:  # OmegaConf's word for it: it does not merge lists with keys
        raise ConfigError(
            f"{path} with {', '.join(overrides)}: one gives a list where the other has keys; override a list "
            "as a whole (key.sub=[1,2])"
        ) from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML in UTF-8: {error}") from None


def _reason(error: object) -> str:
    assert isinstance(error, dict)
    if error["type"] == "extra_forbidden":
        return "unknown key (see docs/configuration.md, or `python -m jf_cluster config`)"
    return f"{error['msg']} (got {error['input']!r})"
