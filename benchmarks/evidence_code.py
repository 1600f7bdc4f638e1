"""Files and folders that rows of the evidence depend on, as git's path specifications."""

# Files for several processes: every row runs in one.
CLUSTER = ["cluster", "ray_process", "left_behind", "sampler_actor", "sampler_pool"]
CLUSTER += ["sharded_trainer", "trainer_group", "trainer_rank"]
BACKEND = (
    "posttrain/backend",
    *(f":(exclude)posttrain/backend/{name}.py" for name in CLUSTER),
    "posttrain/renderers",
    "posttrain/tracking",
)
SUPERVISED = (*BACKEND, "supervised")
RL = (*SUPERVISED, "rl", "envs", "recipes/warm_start.py")
PREFERENCE = (*SUPERVISED, "preference", "recipes/warm_start.py")
