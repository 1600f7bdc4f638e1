"""The streams of random numbers of a seed: the list after it for NumPy's SeedSequence. A new use gets
a line here and a list unlike all others; NumPy ignores zeros at the end ([1, 2] is [1, 2, 0]). Two
equal lists stay, to keep results: held-out items and epoch 0's order, where both seeds are equal;
streams without a batch (PRM_CHAINS, kind words' comparisons) and an epoch's order. Supervised runs in
one recipe have seeds 1 or 1000 apart (a completer, its policy; a seed of star_graph's policy).

    seed of              list after the seed                     what is drawn
    env, dataset         epoch                                   the order of a list (datasets.py), of BST's rows
                         epoch, source, pass                     the order of a source in a mixture
                         GROUPS, batch                           tasks of an RL batch, with replacement
                         EXAMPLES, epoch, batch                  tasks to imitate; the rows of a supervised star-graph batch
                         GRAPH_GROUPS, epoch, batch              the star graphs of an RL batch
                         GUIDED, epoch, batch / GUIDED_PAIRS, step    the graphs of Q#'s classifier / what is sampled on them
                         TRAINING_GAMES or TEST_GAMES, game      TextArena
                         RATED_GAMES, opening                    TextArena, in Elo ratings
                         0 or 1 / 2 or 3, epoch, batch           kind words: comparisons / notes, each to train on or held out
                         batch, game                             tic-tac-toe: random play to imitate
                         epoch, batch / letters                  letters: random orders / one comparison
    split_seed           (nothing)                               which items of a list are held out
                         HELD_OUT_EXAMPLES, batch                demonstrations of held-out games
                         DEV                                     B-STaR's dev subset
                         operands, largest / 1, part             B-STaR's sums / their human solutions
    the run              TRAINING, batch, group, member, turn    rollouts; a retry adds RETRY + its number
                         EVALUATION, ...                         rollouts of evaluations
                         LIKELIHOOD, ...                         LaTRO: rationales of evaluations
                         PRM_CHAINS                              the PRM recipe's chains
                         round, SWEEP to GREEDY, T, chunk        B-STaR's pools
                         round, pass                             the order of what a round of B-STaR is trained on
"""

from collections.abc import Sequence

import numpy as np

# tasks drawn anew: for RL, to imitate, and the demonstrations of held-out ones
GROUPS, EXAMPLES, HELD_OUT_EXAMPLES = 1, 2, 3
TRAINING_GAMES, TEST_GAMES, RATED_GAMES = 0, 1, 2
GRAPHS, GRAPH_GROUPS, GUIDED, GUIDED_PAIRS = 1, 2, 3, 4  # star graphs
PRM_CHAINS = 3
DEV = 7
# sampling: evaluation must not change what training samples
TRAINING, EVALUATION, LIKELIHOOD = 0, 1, 77
RETRY = 1 << 16  # keeps the attempts of a member apart from the members
SWEEP, SAMPLE, TEST, GREEDY = range(4)


def sampling_seed(entropy: Sequence[int]) -> int:
    """One number for a sampler, a pure function of such a list."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
