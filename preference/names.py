"""Short names of the command line: of comparison datasets and of losses."""

from supervised.names import FILES

COMPARISONS = "preference.comparisons:"
DATASETS = {
    "chosen_rejected": f"{COMPARISONS}ChosenRejectedBuilder",
    "labeled": f"{COMPARISONS}LabeledBuilder",
    "transcripts": f"{COMPARISONS}TranscriptBuilder",
    "scored_samples": f"{COMPARISONS}ScoredSamplesBuilder",
    "hhh": f"{COMPARISONS}TranscriptBuilder path=Anthropic/hh-rlhf test_split=test empty=drop malformed=drop",
    "ultrafeedback": f"{COMPARISONS}ChosenRejectedBuilder path=HuggingFaceH4/ultrafeedback_binarized "
    "split=train_prefs test_split=test_prefs empty=drop",
    "tulu3": f"{COMPARISONS}ChosenRejectedBuilder path=allenai/llama-3.1-tulu-3-8b-preference-mixture test_size=1024 "
    "empty=drop",
    "helpsteer2": f"{COMPARISONS}ScoredSamplesBuilder path=nvidia/HelpSteer2 test_split=validation "
    "completion_field=response score_field=helpfulness empty=drop",
    "helpsteer3": f"{COMPARISONS}RatedPairBuilder path=nvidia/HelpSteer3 test_split=validation empty=drop",
    "gsm8k_solutions": f"{COMPARISONS}ScoredSamplesBuilder prompt_field=question completion_field=solution "
    "score_field=is_correct test_size=200",
    **dict.fromkeys(FILES, "preference.forms:FileBuilder path={}"),
}
METHODS = {name: f"preference.losses:{name.upper()}" for name in ("dpo", "rpo", "ipo")} | {
    "simpo": "preference.losses:SimPO"
}
