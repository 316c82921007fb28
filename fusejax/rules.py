"""What must hold between several keys of a job's configuration; ValueError with one line that names a key."""

from typing import TYPE_CHECKING, Any

from fusejax import arguments, paths

if TYPE_CHECKING:
    from fusejax.config import Config


def check_batch(config: "Config") -> None:
    """Sequences divide over the mesh and into microbatches."""
    if -1 in (config.mesh.data, config.mesh.fsdp):
        return  # whatever is chosen will divide the batch
    shards, sequences, micro = config.mesh.data * config.mesh.fsdp, config.batch.sequences, config.batch.microbatch
    if sequences % shards:
        raise ValueError(
            f"batch.sequences: {sequences} does not divide over mesh.data x mesh.fsdp = {shards}; "
            f"{-(-sequences // shards) * shards} would"
        )
    if micro is not None and (sequences % micro or micro % shards):
        fitting = [n for n in range(shards, sequences + 1, shards) if sequences % n == 0]
        raise ValueError(
            f"batch.microbatch: {micro} should divide batch.sequences = {sequences} and be a multiple of mesh.data "
            f"x mesh.fsdp = {shards}: {', '.join(map(str, fitting))}"
        )


def check_fusion(config: "Config") -> None:
    """Keys of `fusion` are used where they are given."""
    n, fusion = len(config.sources), config.fusion
    if fusion.kind == "fixed" and (fusion.weights is None or len(fusion.weights) != n):
        raise ValueError(f"fusion.weights: kind 'fixed' needs one weight for each of the {n} sources")
    if fusion.kind != "fixed" and fusion.weights is not None:
        raise ValueError("fusion.weights: only used with fusion.kind 'fixed'")
    if fusion.weights is not None:
        objection = arguments.weights_objection(fusion.weights)
        if objection:
            raise ValueError(f"fusion.weights: {objection}")
    if fusion.temperature != 1 and (fusion.kind != "avg_ce" or fusion.weighting == "reference"):
        raise ValueError("fusion.temperature: only used with fusion.kind 'avg_ce' and fusion.weighting 'softmax'")
    # Values, not whether a key is given: a dumped configuration gives every key.
    if fusion.window != type(fusion).model_fields["window"].default and fusion.level != "token":
        raise ValueError("fusion.window: only used with fusion.level 'token'")
    if fusion.weighting == "reference" and fusion.kind != "avg_ce" and not config.compat:
        raise ValueError("fusion.weighting: only used with fusion.kind 'avg_ce'")
    if fusion.gate and config.compat:
        raise ValueError(f"fusion.gate: compat {config.compat!r} knows no gate")
    if fusion.gate and fusion.ce_unit == "token":
        raise ValueError(
            "fusion.gate: compares cross-entropies of the same text; fusion.ce_unit should be 'byte' or 'aligned', "
            "not 'token'"
        )
    if config.compat and fusion.kind not in ("min_ce", "avg_ce"):
        raise ValueError(f"compat: {config.compat!r} knows no fusion.kind {fusion.kind!r}; use min_ce or avg_ce")
    _check_pairs(config)


def _check_pairs(config: "Config") -> None:
    merge, n = config.fusion.merge, len(config.partners)
    if config.fusion.kind != "pairwise":
        if merge is not None:
            raise ValueError("fusion.merge: only used with fusion.kind 'pairwise'")
        return
    if merge is None:
        raise ValueError("fusion.merge: kind 'pairwise' needs a method to merge with, for example `merge: sce`")
    if n < 2 or (merge.method == "slerp" and n != 2):
        wanted = "two" if merge.method == "slerp" else "two or more"
        raise ValueError(f"fusion.kind: 'pairwise' needs {wanted} sources besides the target, here are {n}")


def check_bucket(config: "Config") -> None:
    """What works with links between folders, or with libraries that know only those."""
    uses = {
        "profile": config.profile is not None,
        "fusion.kind: 'pairwise'": config.fusion.kind == "pairwise",
        "evaluation.baselines: all but 'ensemble'": bool(set(config.evaluation.baselines) - {"ensemble"}),
    }
    in_a_bucket = paths.is_remote(config.folder)
    for key, used in uses.items():
        if used and in_a_bucket:
            raise ValueError(f"{key}: needs an `output` on this machine, not {config.output}")


def with_templates(values: Any) -> Any:
    """Values of a configuration of conversations: every model reads them by its own chat template."""
    corpus = values.get("corpus") if isinstance(values, dict) else None
    if not isinstance(corpus, dict) or corpus.get("messages_key") is None:
        return values

    def chatting(model: Any) -> Any:
        model = {"model": model} if isinstance(model, str) else model
        return {"bos": "template"} | model if isinstance(model, dict) else model

    values = dict(values)
    if "target" in values:
        values["target"] = chatting(values["target"])
    if isinstance(values.get("sources"), list | tuple):
        values["sources"] = [chatting(source) for source in values["sources"]]
    return values


def check_conversations(config: "Config") -> None:
    """A corpus of conversations, templates of all models, and settings that are defined for them."""
    chat = config.corpus.messages_key is not None
    for model in (config.target, *config.sources):
        if (model.bos == "template") != chat:
            raise ValueError(
                f"{model.label}: bos 'template' belongs to corpus.messages_key, one is not without the other"
            )
    if not chat:
        return
    heldout = config.evaluation.corpus
    if heldout is not None and heldout.messages_key is None:
        raise ValueError("evaluation.corpus.messages_key: should be set, as it is in `corpus`")
    wrong = {
        "compat": config.compat is not None,
        "fusion.gate": config.fusion.gate is not None,
        "fusion.ce_unit: 'token'": config.fusion.ce_unit == "token",
    }
    for key, given in wrong.items():
        if given:
            raise ValueError(f"{key}: not used with conversations (corpus.messages_key)")
