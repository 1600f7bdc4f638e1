"""The label-token reward model: a language model reads two answers and says A, B or Tie. Training
is supervised fine-tuning on the label's token. Inference samples nothing: one forward pass gives
the probabilities of the labels, and the score is P(B) - P(A), averaged over both orders of the
sides against position bias. Left out: explanations before the label, more than two answers.
"""

from collections.abc import Sequence
from typing import get_args

import chz
import numpy as np

from posttrain.backend.errors import ConfigError, ContextLengthError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, LoraConfig, ModelInput
from posttrain.renderers.types import Message, Renderer, Tokenizer, TrainOnWhat
from posttrain.tracking.datasets import ListDataset
from preference.comparisons import in_both_orders, randomly_swapped
from preference.reward_data import RewardExamplesBuilder
from preference.reward_types import Judge, JudgeBuilder, JudgeError, PreferenceModel, SavedModel
from preference.types import Comparison, Label, LabeledComparison
from supervised.examples import Examples, by_processes
from supervised.train import CrossEntropy, Objective
from supervised.types import SupervisedDataset

LABELS: tuple[Label, ...] = get_args(Label)
LABEL_ROOM = 8  # tokens for a label and its lead


def question(comparison: Comparison) -> list[Message]:
    """The comparison as one user message that asks for a label: every renderer has this role."""
    sides = [_text(side) for side in (comparison.prompt_conversation, comparison.completion_A, comparison.completion_B)]
    return [Message(role="user", content="{}\n\n[A]\n{}\n\n[B]\n{}\n\n[Better]\n".format(*sides))]


def _text(messages: Sequence[Message]) -> str:
    if any(not message["content"] and message.get("parts") for message in messages):
        raise DataError("an answer with thinking or tool calls, which a judge of texts cannot read")
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


class LabelFormat:
    """Comparisons as tokens. `lead` is the prefix of every label (a space, an empty thought); the
    token after it differs."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        question = [Message(role="user", content="?")]
        prompt = renderer.build_generation_prompt(question).to_ints()
        spoken = [self._answered(question, label) for label in LABELS]
        if any(tokens[: len(prompt)] != prompt for tokens in spoken):
            raise ConfigError(
                "this renderer's training examples do not begin with its prompts: it cannot ask for a label"
            )
        answers = [tokens[len(prompt) :] for tokens in spoken]
        shared = next((i for i, column in enumerate(zip(*answers, strict=False)) if len(set(column)) > 1), 0)
        self.lead, self.label_tokens = answers[0][:shared], [answer[shared] for answer in answers]
        if len(set(self.label_tokens)) < len(LABELS):
            raise ConfigError(
                f"the labels {LABELS} do not differ in one token under this tokenizer: use the scalar reward model"
            )

    def _answered(self, question: list[Message], label: Label) -> list[int]:
        example = [*question, Message(role="assistant", content=label)]
        return self.renderer.build_supervised_example(example, TrainOnWhat.LAST_ASSISTANT_MESSAGE)[0]

    def prompt(self, comparison: Comparison) -> list[int]:
        return self.renderer.build_generation_prompt(question(comparison)).to_ints() + self.lead

    def examples(self, labeled_D: Sequence[LabeledComparison]) -> Examples:
        """Loss on the label's token alone, which is the last."""
        examples = Examples()
        for labeled in labeled_D:
            tokens = [*self.prompt(labeled.comparison), self.label_tokens[LABELS.index(labeled.label)]]
            examples.append(tokens, [0.0] * (len(tokens) - 1) + [1.0])
        return examples

    def inquiry(self, comparison: Comparison) -> Datum:
        """Asks for the logprobs of all three labels, (T, 3) targets, at the last position."""
        tokens = self.prompt(comparison)
        weights_TK = np.zeros((len(tokens), len(LABELS)), dtype=np.float32)
        weights_TK[-1] = 1
        targets_TK = np.tile(np.array(self.label_tokens), (len(tokens), 1))
        return Datum(ModelInput.from_ints(tokens), {"target_tokens": targets_TK, "weights": weights_TK})


class LabelModel(PreferenceModel):
    """`both_orders` averages the score over both orders. Labels with less than `min_label_mass`
    together raise JudgeError: the model is no label model, or was trained with another renderer."""

    def __init__(
        self, client: TrainingClient, renderer: Renderer, both_orders: bool = True, min_label_mass: float = 0.5
    ):
        self.client, self.format = client, LabelFormat(renderer)
        self.both_orders, self.min_label_mass = both_orders, min_label_mass

    async def compare(self, comparisons_D: Sequence[Comparison]) -> list[float]:
        """One forward pass. ContextLengthError if a comparison exceeds the model's context."""
        if not comparisons_D:
            return []
        swapped_D = [comparison.swap() for comparison in comparisons_D] if self.both_orders else []
        probabilities_DK = await self.probabilities([*comparisons_D, *swapped_D])
        score_D = probabilities_DK[:, 1] - probabilities_DK[:, 0]
        if self.both_orders:
            score_D = (score_D[: len(comparisons_D)] - score_D[len(comparisons_D) :]) / 2
        return score_D.tolist()

    async def probabilities(self, comparisons_D: Sequence[Comparison]) -> np.ndarray:
        """(D, 3) probabilities of A, B and Tie."""
        data_D = [self.format.inquiry(comparison) for comparison in comparisons_D]
        longest = max(datum.model_input.length for datum in data_D)
        if longest > (limit := self.client.get_info().max_length):
            raise ContextLengthError(
                f"a comparison has {longest} tokens, the label model's context {limit}: "
                "lower max_tokens, or leave such comparisons out"
            )
        output = await self.client.forward(data_D, "cross_entropy", all_logprobs=False)
        probabilities_DK = np.exp([out["logprobs"].array[-1] for out in output.loss_fn_outputs])
        if (mass := probabilities_DK.sum(-1).min()) < self.min_label_mass:
            raise JudgeError(
                f"the model gives A, B and Tie a probability of {mass:.2f} together: it was not trained to say them"
            )
        return probabilities_DK


@chz.chz
class LabelModelBuilder(SavedModel, JudgeBuilder):
    """A saved label-token model as a judge."""

    both_orders: bool = chz.field(default=True, doc="ask in both orders and average; false where the caller does it")

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        client, renderer = self.open(ServiceClient.create_training_client_from_state, tokenizer)
        return LabelModel(client, renderer, self.both_orders)


@chz.chz
class LabelExamplesBuilder(RewardExamplesBuilder):
    """Comparisons to train a label-token model on. A tie is a label."""

    both_orders: bool = chz.field(
        default=True, doc="every comparison in both orders; false = in one, drawn by its hash and `seed`"
    )

    def examples(self, renderer: Renderer, labeled_D: Sequence[LabeledComparison]) -> SupervisedDataset:
        ordered = in_both_orders(labeled_D) if self.both_orders else randomly_swapped(labeled_D, self.seed)
        data_D = Examples()
        for part in by_processes(LabelFormat(renderer).examples, ordered, "tokenizing comparisons"):
            data_D.extend(part)
        return ListDataset(data_D, min(self.batch_size, len(data_D)), self.seed)

    def length(self, renderer: Renderer, labeled: LabeledComparison) -> int:
        return renderer.build_generation_prompt(question(labeled.comparison)).length + LABEL_ROOM

    def create_client(
        self, service: ServiceClient, model_name: str, lora: LoraConfig | None, seed: int
    ) -> TrainingClient:
        return service.create_training_client(model_name, lora, seed)

    def model(self, client: TrainingClient, renderer: Renderer) -> PreferenceModel:
        # untrained, it says anything but a label
        return LabelModel(client, renderer, both_orders=False, min_label_mass=0.0)

    def objective(self) -> Objective[list[Datum]]:
        return CrossEntropy()
