"""Short names of the command line: of environments and of advantage estimators."""

ENVS = {
    "arithmetic": "envs.arithmetic:ArithmeticBuilder",
    "gsm8k": "envs.math_word:Gsm8kBuilder",
    "math": "envs.math_word:MathBuilder",
    "polaris": "envs.math_word:MathWordBuilder hub_name=POLARIS-Project/Polaris-Dataset-53K test_split=None "
    "answer_field=answer gold_style=plain bad_gold=drop tag=polaris",
    "deepmath": "envs.math_word:MathWordBuilder hub_name=zwhe99/DeepMath-103K test_split=None question_field=question "
    "answer_field=final_answer gold_style=plain bad_gold=drop tag=deepmath",
    "interleaved": "envs.interleaved:InterleavedBuilder",
    "arc": "envs.arc_challenge:ArcBuilder",
    "code": "envs.code:CodeBuilder",
    "tool_use": "envs.tool_use:CalculatorBuilder",
    "calculator": "envs.calculator:SumsBuilder",
    "retrieval": "envs.retrieval:RetrievalBuilder",
    "guess_number": "envs.guess_number:GuessNumberBuilder",
    "guess_the_number": "envs.guess_number:GuessNumberBuilder",
    "twenty_questions": "envs.twenty_questions:TwentyQuestionsBuilder",
    "textarena": "envs.textarena:TextArenaBuilder",
    "chain": "envs.arithmetic_chain:ChainBuilder",
    "pairwise": "envs.pairwise:PairwiseBuilder",
    "reward_model": "envs.reward_model_env:RewardModelEnvBuilder",
    "single_turn": "envs.single_turn:SingleTurnBuilder",
    "rubric": "envs.single_turn:RubricBuilder",
    "star_graph": "envs.star_graph_data:StarGraphBuilder",
    "agent": "envs.agent:AgentBuilder",
    "verifiers": "envs.verifiers_adapter:VerifiersBuilder",
}
ADVANTAGES = {
    "group_mean": "rl.advantages:GroupMean",
    "group_mean_std": "rl.advantages:GroupMeanStd",
    "rloo": "rl.advantages:LeaveOneOut",
    "batch_mean": "rl.advantages:BatchMean",
    "seat_mean": "rl.advantages:SeatMean",
    "none": "rl.advantages:NoBaseline",
    "no_reward": "rl.advantages:NoReward",
}
# Held-out problems only, scored as published: rl/evaluate.py, and evaluators in training runs.
BENCHMARKS = {
    "math500": "envs.math_benchmarks:Math500",
    "aime": "envs.math_benchmarks:Aime",
    "mmlu_pro": "envs.multiple_choice:MmluPro",
    "gpqa": "envs.multiple_choice:Gpqa",
    "ifeval": "envs.ifeval:IfEval",
    "humaneval": "envs.code_benchmarks:HumanEval",
    "mbpp": "envs.code_benchmarks:Mbpp",
    "*.jsonl": "envs.benchmark_file:BenchmarkFile path={}",
}
