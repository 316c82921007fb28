"""The benchmarks of FuseLLM's paper, as tasks of lm-evaluation-harness, and what its authors published.

The definitions are the harness's own, named here with shots and metric. What the paper used follows from what its
authors say they ran (`SOURCE`): of the five common-sense tasks lm-evaluation-harness 0.3.0, whose zero-shot `acc_norm`
(BoolQ: `acc`) gives Llama-2-7B what they report; Big-Bench Hard by open-instruct's program; TriviaQA, DROP and LAMBADA
by OpenCompass, with other prompts.
"""

from dataclasses import dataclass

SOURCE = "the authors' README (github.com/fanqiwan/FuseLLM, FuseLLM-7B, its two tables of results)"
PUBLISHED_MODELS = ("Llama-2 7B", "Llama-2 CLM", "FuseLLM 7B")


@dataclass(frozen=True)
class Benchmark:
    """One row of a suite.

    task: the harness's name, of a task or a group. members: a group's tasks. dataset: where its data comes from.
    metric: the harness's key. published: in percent, of `PUBLISHED_MODELS`. comparable: whether the paper's numbers
    were made with these prompts and this metric.
    """

    name: str
    task: str
    dataset: str
    shots: int
    metric: str
    published: tuple[float, float, float]
    comparable: bool = True
    members: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have data of their own."""
        return self.members or (self.task,)

    @property
    def shown_metric(self) -> str:
        return self.metric.partition(",")[0]


_BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)  # fmt: skip

_NORM = "acc_norm,none"
FUSELLM = (
    Benchmark(
        "BBH", "bbh_cot_fewshot", "SaylorTwift/bbh", 3, "exact_match,get-answer", (39.70, 40.44, 41.75),
        comparable=False, members=tuple(f"bbh_cot_fewshot_{name}" for name in _BBH),
    ),
    Benchmark("ARC-easy", "arc_easy", "allenai/ai2_arc", 0, _NORM, (74.58, 74.54, 75.04)),
    Benchmark("ARC-challenge", "arc_challenge", "allenai/ai2_arc", 0, _NORM, (46.33, 46.50, 47.44)),
    Benchmark("BoolQ", "boolq", "aps/super_glue", 0, "acc,none", (77.71, 76.88, 78.13)),
    Benchmark("HellaSwag", "hellaswag", "Rowan/hellaswag", 0, _NORM, (76.00, 76.57, 76.78)),
    Benchmark("OpenBookQA", "openbookqa", "allenai/openbookqa", 0, _NORM, (44.20, 44.80, 45.40)),
    Benchmark("TriviaQA", "triviaqa", "mandarjoshi/trivia_qa", 0, "exact_match,remove_whitespace",
              (52.46, 53.14, 54.49), comparable=False),
    Benchmark("DROP", "drop", "EleutherAI/drop", 0, "em,none", (27.25, 28.51, 28.97), comparable=False),
    Benchmark("LAMBADA", "lambada_openai", "EleutherAI/lambada_openai", 0, "acc,none", (73.28, 73.45, 73.72),
              comparable=False),
)  # fmt: skip
SUITES = {"fusellm": FUSELLM}

# Code is exported, and run elsewhere or on demand; see `fusejax.evaluation.code`. MultiPL-E: mean over its languages.
MULTIPL_E = (14.63, 14.83, 15.56)

COMMON_SENSE = ("ARC-easy", "ARC-challenge", "BoolQ", "HellaSwag", "OpenBookQA")
