"""The configuration of a job: one YAML file, dotted overrides, every value checked before anything runs.

Each key is declared once, below, with its default, its range and its meaning. The paper's recipe
("Knowledge Fusion of Large Language Models", section 4) gives the defaults of training.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import Field, field_validator, model_validator

from fusejax import paths, rules, settings
from fusejax.errors import UserError
from fusejax.merge_keys import MergeKeys
from fusejax.settings import Section

# What the models and their callers may be told; see models.decoder.Decoder.
Remat = Literal["none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable", "offload_dots_with_no_batch_dims"]
AttentionBackend = Literal["auto", "xla", "cudnn", "splash"]


class ModelConfig(Section):
    """A model: a local Hugging Face folder or a hub name."""

    short_form: ClassVar[str] = "a folder or a hub name"
    model: str = Field(min_length=1)
    name: str = ""  # how reports call it; default: the last part of `model`
    revision: str | None = None
    # auto: BOS before each document where the model's tokenizer puts one; template: conversations by its chat template
    bos: Literal["auto", "never", "template"] = "auto"
    top_k: int | None = Field(None, ge=1, le=1024)  # of a source, instead of cache.top_k

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("model")
    @classmethod
    def _is_no_address(cls, model: str) -> str:
        if paths.is_remote(model):
            raise ValueError(
                f"{model} is in a bucket; models are read from folders and the hub: copy it to this machine"
            )
        return model

    @property
    def label(self) -> str:
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


class CorpusConfig(Section):
    """Where documents come from; see `fusejax.corpus`."""

    # FILE.jsonl[.gz] | FILE.parquet | FILE.txt | a folder of these | a local TFDS folder
    # | tfds:NAME | huggingface:NAME | stdlib:
    path: str = Field(min_length=1)
    split: str = "train"
    text_key: str = "text"
    messages_key: str | None = None  # instead: the column of conversations, lists of {role, content}; docs/chat.md
    domain_key: str | None = None  # a column that names each document's domain
    domains: tuple[str, ...] | None = None  # keep these domains only
    limit: int | None = Field(None, ge=1)  # at most so many documents of each domain
    limit_bytes: int | None = Field(None, ge=1)  # at most so many bytes of text of each domain
    expected_tokens: int | None = Field(None, ge=1)  # only for plans of a corpus that is not on this machine


class CacheConfig(Section):
    """The source caches: top-k next-token distributions of every source."""

    kind: Literal["topk", "sampled"] = "topk"  # the top_k most likely tokens | those of `rounds` independent draws
    top_k: int = Field(10, ge=1, le=1024)
    rounds: int = Field(50, ge=1, le=255)
    values: Literal["float16", "float32", "uint8"] = "float16"  # of log-probabilities; uint8: errors up to 0.005 in p
    batch_tokens: int | None = Field(None, ge=1)  # of a forward pass, padding included; default: by the devices' memory
    mesh: Literal["process", "job"] = "process"  # a source lies on each process' own devices | on those of all


class AlignmentConfig(Section):
    """Row maps and token maps."""

    rows: Literal["exact", "mined", "boundary", "inside"] = "inside"
    tokens: Literal["exact", "mined", "stats", "prefix"] = "prefix"
    gold_chain: bool = True
    fallback: Literal["gold", "skip"] = "gold"
    collisions: Literal["sum", "first"] = "sum"
    workers: int | None = Field(None, ge=1)  # processes of the stage `align`; default: one for each CPU


class PairMergeConfig(MergeKeys):
    """How the copies of the target that pairwise fusion made become one model; `merge: sce` is short for its method."""

    short_form: ClassVar[str] = "a method"
    density: float = Field(1.0, gt=0, le=1)  # part of each copy's task vector that stays: ties, dare
    corpus: CorpusConfig | None = None  # greedy_soup: text to choose by, neither trained nor evaluated on

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value


class FusionConfig(Section):
    """How the aligned distributions become one."""

    # pairwise (FuseChat): each source by min_ce into a copy of the target, then the copies are merged
    kind: Literal["min_ce", "avg_ce", "fixed", "pairwise"] = "min_ce"
    level: Literal["document", "token", "block"] = "document"  # block: all documents of a packed sequence together
    window: int = Field(16, ge=1)  # level token: CE is averaged over so many rows around each
    ce_unit: Literal["byte", "aligned", "token"] = "byte"
    temperature: float = Field(1.0, ge=1e-3, le=1e3)  # avg_ce: weights are softmax(-CE / temperature)
    weighting: Literal["softmax", "reference"] = "softmax"  # reference: softmax(exp(-CE)), as the paper's code has it
    weights: tuple[float, ...] | None = None  # kind fixed: one weight for each source
    merge: PairMergeConfig | None = None  # kind pairwise: how the copies are merged
    gate: Literal["target"] | None = None  # target: no source counts where the model in training has a lower CE


class LossConfig(Section):
    """L = weight_clm * L_CLM + (1 - weight_clm) * L_Fusion."""

    kind: Literal["ce", "kl"] = "ce"
    weight_clm: float = Field(0.9, ge=0, le=1)
    schedule: Literal["constant", "linear"] = "constant"  # linear: weight_clm rises to 1 over the run
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    tail: Literal["tail", "renormalize"] = "tail"
    z_loss: float = Field(0.0, ge=0)  # z_loss * logsumexp(logits)^2 is added
    model_entropy: bool = False  # among the metrics; one more pass over the logits, 10 to 40% of the loss on a CPU


class OptimizerConfig(Section):
    """AdamW with warm-up; the paper's values."""

    kind: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: float = Field(0.008, ge=0, le=1)
    end_ratio: float = Field(0.0, ge=0, le=1)  # final learning rate / peak
    decay_ratio: float = Field(0.1, ge=0, le=1)  # schedule wsd: the share of all steps that decays at the end
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decay: Literal["matrices", "all"] = "matrices"  # matrices: neither biases nor the scales of norms decay
    grad_clip: float = Field(1.0, gt=0)
    frozen: tuple[str, ...] = ()  # parameters that stay as they are: `embedding`, `blocks.0`, `blocks.*.mlp`
    ema: float | None = Field(None, gt=0, lt=1)  # export a running mean of the parameters with this decay


class LoraConfig(Section):
    """Low-rank adapters instead of all parameters (Hu et al. 2021); they are merged into the weights on export."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)  # the update is alpha / rank * A @ B
    targets: tuple[str, ...] = ("query", "value")  # of attention: query key value out; of the MLP: gate up down


class GuardConfig(Section):
    """Steps whose loss or gradient is no number are skipped and counted; so are spikes, where asked for."""

    spike: float | None = Field(None, gt=0)  # skip a step whose loss is so many standard deviations above its mean
    limit: int = Field(5, ge=1)  # skipped steps in a row that end the run


class BatchConfig(Section):
    """What one optimizer step sees."""

    sequences: int = Field(128, ge=1)  # packed sequences of `max_length` tokens, over all devices and microbatches
    microbatch: int | None = Field(None, ge=1)  # sequences of one forward and backward pass; default: all of them
    packed: bool = True  # several documents in a sequence, each seeing itself alone; else one document in each
    epochs: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)  # overrides epochs


class MeshConfig(Section):
    """Devices along each mesh axis; their product is the number of devices used.

    -1: chosen when the devices are known, see `sharding.resolve`; `mesh: auto` leaves all three open.
    """

    short_form: ClassVar[str] = "auto"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return dict.fromkeys(cls.model_fields, -1) if value == "auto" else value

    @field_validator("data", "fsdp", "tensor")
    @classmethod
    def _size(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError(f"{value} should be at least 1, or -1 for what the number of devices makes of it")
        return value

    @property
    def is_open(self) -> bool:
        """Whether an axis is left to be chosen."""
        return -1 in (self.data, self.fsdp, self.tensor)


class KernelsConfig(Section):
    """Which implementation computes loss and top-k; see docs/kernels.md."""

    fusion_loss: Literal["auto", "xla", "tpu", "gpu"] = "auto"  # tpu, gpu: Pallas kernels
    topk_unembed: Literal["auto", "xla", "tpu"] = "auto"  # of the source caches


class PrecisionConfig(Section):
    """Computation, parameters and export; parameters, sums and losses stay float32."""

    compute: Literal["float32", "bfloat16"] = "bfloat16"
    params: Literal["float32"] = "float32"
    export: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the target's own


class CheckpointConfig(Section):
    """Orbax checkpoints of the training state."""

    every: int = Field(500, ge=1)  # steps
    keep: int = Field(2, ge=1)  # the latest
    keep_best: int = Field(0, ge=0)  # and those before which the loss was least
    resume: bool = True  # go on from the latest checkpoint


class ProfileConfig(Section):
    """A window of steps whose profile goes to OUTPUT/profile, for XProf or TensorBoard."""

    start: int = Field(10, ge=1)  # the first step of it; the run's first step compiles
    steps: int = Field(5, ge=1)


class DistributedConfig(Section):
    """Several processes, each on its own devices; see `fusejax.distributed`. Default: what the cluster says."""

    coordinator: str | None = None  # HOST:PORT of process 0; also JAX_COORDINATOR_ADDRESS
    processes: int | None = Field(None, ge=1)  # also JAX_NUM_PROCESSES
    process: int | None = Field(None, ge=0)  # this one's number; also JAX_PROCESS_ID
    local_devices: tuple[int, ...] | None = None  # numbers of this process' GPUs; default: all, or as Slurm says
    devices: int | None = Field(None, ge=1)  # how many are expected in all: fewer or more is an error
    timeout_s: float = Field(120.0, ge=5)  # a process that is missing or gone for so long ends the job


Baseline = Literal["distill", "exact", "avg_ce", "fusellm", "merge", "ensemble"]


class EvaluationConfig(Section):
    """Held-out documents, and what the fused model is compared with."""

    corpus: CorpusConfig | None = None
    clm: bool = True  # also train with CLM alone: same data, steps and seed
    baselines: tuple[Baseline, ...] = ()  # what else to compare with; see `fusejax.evaluation.baselines`
    batch_tokens: int = Field(8192, ge=1)

    @field_validator("baselines")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))


# What `compat` sets: the quirks of the paper's code that have a key. The others follow from `compat` itself.
COMPAT: dict[str, dict[str, dict[str, Any]]] = {
    "fusellm": {
        "alignment": {
            "rows": "mined",
            "tokens": "mined",
            "gold_chain": False,
            "fallback": "gold",
            "collisions": "first",
        },
        "fusion": {"level": "block", "ce_unit": "token", "weighting": "reference"},
        "loss": {"tail": "renormalize", "z_loss": 0.0},
    }
}


class Config(Section):
    """The whole job."""

    target: ModelConfig
    sources: tuple[ModelConfig, ...] = ()
    corpus: CorpusConfig
    max_length: int = Field(2048, ge=8)
    cache: CacheConfig = CacheConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    guard: GuardConfig = GuardConfig()
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelsConfig = KernelsConfig()
    precision: PrecisionConfig = PrecisionConfig()
    remat: Remat = "none"  # what the backward pass computes again
    attention: AttentionBackend = "auto"  # auto: the fastest that honours what each model needs
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    profile: ProfileConfig | None = None
    wandb: str | None = None  # also log to this project of Weights & Biases (the package must be installed)
    compilation_cache: str | None = None  # a folder that keeps compiled programs; also JAX_COMPILATION_CACHE_DIR
    evaluation: EvaluationConfig = EvaluationConfig()
    compat: Literal["fusellm"] | None = None  # reproduce the paper's code, its quirks included; see docs/fusion.md
    output: str = ""
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _set_templates(cls, values: Any) -> Any:
        return rules.with_templates(values)

    @model_validator(mode="before")
    @classmethod
    def _set_compat(cls, values: Any) -> Any:
        """The keys that `compat` sets; one that is given and says otherwise is a contradiction."""
        quirks = COMPAT.get(str(values.get("compat"))) if isinstance(values, dict) else None
        if quirks is None:
            return values
        values = dict(values)
        for section, wanted in quirks.items():
            given = values.get(section)
            if given is not None and not isinstance(given, dict):
                continue  # a value of the wrong type gets its own message
            for key, value in wanted.items():
                if given and given.get(key, value) != value:
                    raise ValueError(
                        f"compat: {values['compat']!r} sets {section}.{key} to {value!r}, but it is {given[key]!r}; "
                        "remove one of the two"
                    )
            values[section] = (given or {}) | wanted
        return values

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, sources: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        labels = [source.label for source in sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sources are called {label!r}: give one of them another `name`")
            taken = ("target", "clm", "fused", "average", *get_args(Baseline))
            if label in taken or "/" in label or label.startswith("."):
                raise ValueError(f"a source cannot be called {label!r}: give it another `name`")
        return sources

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        for source in self.sources:
            if source.model == self.target.model and (source.revision, source.bos) != (
                self.target.revision,
                self.target.bos,
            ):
                raise ValueError(
                    f"sources: {source.model} is the target, so its `revision` and `bos` should be the same"
                )
        if self.lora is not None and self.optimizer.frozen:
            raise ValueError("optimizer.frozen: under `lora` all parameters are frozen already; remove one of the two")
        if self.evaluation.baselines and not self.sources:
            raise ValueError("evaluation.baselines: there are no sources that they could use")
        rules.check_fusion(self)
        rules.check_batch(self)
        rules.check_conversations(self)
        rules.check_bucket(self)
        return self

    @property
    def partners(self) -> tuple[ModelConfig, ...]:
        """The sources other than the target itself."""
        return tuple(source for source in self.sources if source.model != self.target.model)

    @property
    def folder(self) -> Path:
        return paths.at(self.output)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read CONFIG.yaml, apply `key=value` overrides (values in YAML), validate.

    `output` defaults to runs/NAME for NAME.yaml. Raises UserError with one line that names the file and the key.
    """
    values = settings.read(path, overrides)
    if not {"target", "sources", "corpus"} & set(values):
        hint = f"`fusejax merge {path}` takes it" if "method" in values else "a job has `target`, `corpus` and others"
        raise UserError(f"{path}: this is not a job's configuration; {hint}")
    values.setdefault("output", f"runs/{Path(path).stem}")
    return validate(values, where=str(path))


def validate(values: dict[str, Any], where: str = "config") -> Config:
    """`values` as a Config, or a UserError naming the key."""
    return settings.check(values, Config, where)


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` of it gives `config` again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
