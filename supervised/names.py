"""Short names of the command line: of supervised datasets, and of evaluators in any run."""

FILES = ("*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.parquet")  # whose form is found by their fields
DATASETS = {
    "arithmetic": "envs.arithmetic:ArithmeticExamplesBuilder",
    "calculator": "envs.calculator:SumsExamplesBuilder",
    "retrieval": "envs.retrieval:RetrievalExamplesBuilder",
    "conversations": "supervised.data:ConversationFileBuilder",
    "prompt_completion": "supervised.data:PromptCompletionFileBuilder",
    "gsm8k": "supervised.data:PromptCompletionFileBuilder prompt_field=question completion_field=answer",
    "problems": "envs.problem_env:ProblemExamples",
    "huggingface": "supervised.data:HuggingFaceBuilder",
    "no_robots": "supervised.data:HuggingFaceBuilder name=HuggingFaceH4/no_robots test_split=test",
    "tulu3": "supervised.data:HuggingFaceBuilder name=allenai/tulu-3-sft-mixture test_size=1024",
    "mixture": "supervised.data:MixtureBuilder",
    "star_graph": "envs.star_graph_data:StarGraphExamplesBuilder",
    **dict.fromkeys(FILES, "supervised.data:FileBuilder path={}"),
}
# of supervised, preference and RL runs
EVALUATORS = {
    "env": "rl.evaluators:EnvEvaluator",
    "nll": "supervised.nll:DatasetNLL",
    "elo": "envs.elo:EloEvaluator",
}
EVALUATOR_OPTIONS = {"evaluators.*": EVALUATORS, "infrequent_evaluators.*": EVALUATORS}
