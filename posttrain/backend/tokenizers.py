"""Loads tokenizers, and makes the presets': a byte-level BPE without merges, a token per byte.
Digits are never merged, and any text round-trips. Its chat template marks turns with two special
tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.backend.checkpoint_files import adapted_model, is_adapter, not_pulled, read_json
from posttrain.backend.errors import ConfigError, ModelError, one_line

if TYPE_CHECKING:  # commands answer before transformers is imported
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "tekken.json")
# Words, spaces, digits, accents.
PROBES = ("That is\tit,\n\n  isn't it?\nYES or 12 + 345: 日本語 é naïve\u00a0x", " a ")
WORDS = "yes it is"
CASES = "'The' (\"Call'This'\")"  # where tokenizer.json files of Mistral's split otherwise than its tekken.json
SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def character_tokenizer(max_length: int) -> "PreTrainedTokenizerFast":
    """The presets' tokenizer: ids 0 to 3 are special tokens, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(model_name: str, max_length: int | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a preset, a local folder or a hub name; an adapter without one has its
    base's. `model_max_length` is set to the backend's context."""
    from transformers import AutoTokenizer

    from posttrain.backend.models import PRESETS, context_length, model_folder

    length = context_length(model_name, max_length)
    if model_name in PRESETS:
        return character_tokenizer(length)
    folder = model_folder(model_name)
    if is_adapter(folder) and not (folder / "tokenizer_config.json").exists():
        return load_tokenizer(adapted_model(folder), max_length)
    # transformers would make an empty tokenizer
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{model_name} has no tokenizer (tokenizer.json, tokenizer_config.json): save the model's tokenizer into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        is_mistrals = (folder / "tekken.json").exists() and not hasattr(tokenizer, "backend_tokenizer")
        tokenizer = _as_in_tekken(folder) if is_mistrals else _as_in_its_file(tokenizer, folder)
    except ModelError:
        raise
    except Exception as error:  # of a damaged file, the tokenizers library raises a plain Exception
        reason = not_pulled(folder) or one_line(error, 300) or type(error).__name__
        if "custom code" in reason:
            reason = "it needs code of its own from its repository, which this project does not run"
        raise ModelError(f"no tokenizer could be loaded for {model_name!r}: {reason}") from error
    if len(tokenizer) <= len({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}):
        raise ModelError(
            f"the tokenizer of {model_name!r} has special tokens alone: its vocabulary (tokenizer.json, tokenizer.model, "
            "or vocab.json with merges.txt) is missing"
        )
    if not tokenizer.chat_template and (template := folder / "chat_template.json").exists():
        tokenizer.chat_template = read_json(template).get("chat_template")  # of a processor of pictures
    tokenizer.model_max_length = length
    tokenizer.answer_ends = _answer_ends(folder)  # type: ignore[attr-defined]
    return tokenizer


def _as_in_its_file(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> "PreTrainedTokenizerBase":
    """transformers 5 builds a tokenizer by the class that a folder or the model's type names, around the vocabulary in
    tokenizer.json: a byte-level one of class LlamaTokenizer (DeepSeek-R1-Distill) would lose all spaces."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.exists():
        _warn_of_other_words(tokenizer, folder)
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    saved = Tokenizer.from_file(str(file))
    saved.no_truncation()
    saved.no_padding()
    tokens = [saved.encode(text, add_special_tokens=False).ids for text in PROBES]

    def is_same(found: PreTrainedTokenizerFast) -> bool:
        return tokens == [found.encode(text, add_special_tokens=False, verbose=False) for text in PROBES] and all(
            saved.decode(ids) == found.backend_tokenizer.decode(ids) for ids in tokens
        )

    if is_same(tokenizer):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    return plain if is_same(plain) else tokenizer


def _as_in_tekken(folder: Path) -> "PreTrainedTokenizerBase":
    """Of Mistral's repositories with a tekken.json, of which transformers makes a tokenizer of mistral-common's, with
    neither a chat template nor the methods of others: that of tokenizer.json, with the regular expression that agrees
    with tekken.json."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise ModelError(
            f"{folder} has Mistral's tekken.json alone, whose chat format is code of the package mistral-common: put "
            "a tokenizer.json and its chat template beside it, as the newer of Mistral's repositories have them"
        )
    theirs = Tekkenizer.from_file(folder / "tekken.json").encode(CASES, bos=False, eos=False)
    mended = PreTrainedTokenizerFast.from_pretrained(folder, fix_mistral_regex=True)
    if mended.encode(CASES, add_special_tokens=False) == theirs:
        return mended
    return PreTrainedTokenizerFast.from_pretrained(folder, fix_mistral_regex=False)


def _warn_of_other_words(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Where transformers, of a tokenizer.model alone, makes one that splits a plain text otherwise than it, such as
    without the space before the first word."""
    file = folder / "tokenizer.model"
    try:
        from sentencepiece import SentencePieceProcessor

        theirs = SentencePieceProcessor(model_file=str(file)).encode(WORDS, out_type=str)
    except (ImportError, OSError, RuntimeError):  # tiktoken's and Mistral's files have this name, too
        return
    ours = tokenizer.convert_ids_to_tokens(tokenizer.encode(WORDS, add_special_tokens=False))
    if ours != theirs:
        print(
            f"WARNING {file} writes {WORDS!r} as {theirs}, and the tokenizer that transformers makes of it as {ours}: "
            "put the model's tokenizer.json into the folder, or one that transformers 4 saves",
            flush=True,
        )


def _answer_ends(folder: Path) -> list[int]:
    """The end tokens in a model's configs: samplers stop at each, and the tokenizer knows one of them."""
    from posttrain.backend.models import PRESETS, model_folder

    if is_adapter(folder):
        base = adapted_model(folder)
        if base in PRESETS:
            return []
        folder = model_folder(base)
    files = (folder / name for name in ("generation_config.json", "config.json"))
    read = [read_json(file) for file in files if file.exists()]
    ids = [part.get("eos_token_id") for config in read for part in (config, config.get("text_config") or {})]
    return [i for known in ids for i in (known if isinstance(known, list) else [known]) if isinstance(i, int)]


def check_vocabulary(option: str, path: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """ConfigError if the model at `path` has another vocabulary: it would score other text."""
    theirs, ours = load_tokenizer(path).get_vocab(), tokenizer.get_vocab()
    if differing := sorted(ours.items() ^ theirs.items(), key=lambda item: item[1]):
        token, number = differing[0]
        raise ConfigError(
            f"{option}: its tokenizer has {len(theirs)} tokens, the policy's {len(ours)}, and {token!r} is number "
            f"{number} in only one of them: it must have the policy's vocabulary"
        )
