"""fusejax models in EleutherAI's lm-evaluation-harness, under the name `fusejax`.

    fusejax lm-eval --model fusejax --model_args path=runs/quickstart/export --tasks arc_easy

The harness finds models by what has registered itself, so the command registers this one and then is the harness's own
command line. Requests are tokenized as its `hf` model does it, so that both score the same tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusejax import models, sharding
from fusejax.errors import UserError
from fusejax.models import files, generate
from fusejax.scoring import Scorer

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise UserError("lm-evaluation-harness is not installed: `pip install 'fusejax[lm-eval]'`") from None


@register_model("fusejax")
class FuseJaxLM(TemplateLM):
    """A model folder or hub name for the harness.

    path: the model. revision: of a hub name. dtype: of parameters and computation. max_length: tokens that a request
    may have, longer ones lose their beginning (default: the model's context). batch_tokens: of one scoring pass,
    padding included. batch_size: prompts that are continued together. add_bos_token: as in `hf`, whether BOS is put in
    front (default: what the tokenizer does by itself). Parameters and batches are split over all local devices.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "float32",
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        batch_tokens: int | str = 8192,
        batch_size: int | str | None = None,
        add_bos_token: bool | None = None,
        **other: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(key for key in other if key not in ("device", "max_batch_size"))
        if unknown:
            raise UserError(f"--model_args: unknown {', '.join(unknown)}; known: path, revision, dtype, max_length, "
                            "max_gen_toks, batch_tokens, add_bos_token")  # fmt: skip
        from transformers import AutoTokenizer

        folder = files.local_folder(path, revision)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._mesh = sharding.whole_mesh()
        kind = jnp.dtype(dtype)
        self._model = models.load(folder, mesh=self._mesh, dtype=kind, compute_dtype=kind)
        self.max_length = int(self._model.config.max_length if max_length is None else max_length)
        self.max_gen_toks, self._path = int(max_gen_toks), str(path)
        self._rows = int(batch_size) if batch_size is not None and str(batch_size).isdigit() else 8
        self._add_bos = add_bos_token
        self._scorer = Scorer(
            self._model, k=1, max_length=self.max_length, batch_tokens=int(batch_tokens), mesh=self._mesh
        )

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a request that has no context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's own template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the prefix token gets no other one."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        if add_special_tokens is None:
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether each of its tokens is the most probable one)."""
        inputs, labels = [], []
        for _pair, context, continuation in requests:
            line = np.array([*context, *continuation][-(self.max_length + 1) :], np.int32)
            following = line[1:].copy()
            following[: max(len(following) - len(continuation), 0)] = -1
            inputs.append(line[:-1])
            labels.append(following)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(inputs)
        for places, scores in self._scorer(inputs, labels):
            for place, score in zip(places, scores, strict=True):
                scored = labels[place] >= 0
                greedy = score.ids[scored, 0] == labels[place][scored]
                found[place] = float(-score.ce[scored].sum(dtype=np.float64)), bool(greedy.all())
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows that each see as much as fits."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, before the first of its stop strings, EOS, or `max_gen_toks` tokens."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        found = [""] * len(requests)
        for members in groups.values():
            prompts = {number: self.tok_encode(requests[number].args[0]) for number in members}
            members.sort(key=lambda number: -len(prompts[number]))
            for at in range(0, len(members), self._rows):
                batch = members[at : at + self._rows]
                texts = self._continue([prompts[number] for number in batch], dict(requests[batch[0]].args[1]))
                for number, text in zip(batch, texts, strict=True):
                    found[number] = text
        return found

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        until = options.pop("until", None) or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        most = int(options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks)))
        room = self.max_length - most
        if room < 1:
            raise UserError(f"max_gen_toks: {most} should be less than the {self.max_length} tokens of the context")
        prompts = [prompt[-room:] for prompt in prompts]
        lines: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for now in generate.tokens(self._model, prompts, most, _sampling(options)):
            for row, token in enumerate(now.tolist()):
                if done[row]:
                    continue
                if token == self.eot_token_id:
                    done[row] = True
                    continue
                lines[row].append(token)
                text = self.tokenizer.decode(lines[row], skip_special_tokens=True)
                done[row] = any(stop in text for stop in stops)
            if all(done):
                break
        texts = [self.tokenizer.decode(line, skip_special_tokens=True) for line in lines]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def _sampling(options: dict[str, Any]) -> generate.Sampling:
    """How tokens are chosen; like `hf`, greedy unless `do_sample` or a temperature says otherwise."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return generate.Sampling()
    return generate.Sampling(temperature or 1.0, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0))


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with this model known to it."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
