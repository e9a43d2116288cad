"""What the rehearsal compares."""

from kdkernels.demo.phases import RECIPES

HERE = RECIPES / "twt"
STEPS = {"equations": 400, "sentences": 300, "values": 240}  # of the teachers, which is how they come to differ
BEST = "equations"  # the teacher that is trained longest
DATASETS = {  # of each, what its curation does otherwise than twt.toml
    "twt": {"diversity": "embedding"},
    "single": {"only": (BEST,)},
    "all": {"quality": "none", "diversity": "none"},
}
ARMS = {  # of each, the dataset, the stages, and where it starts if not from the starting student
    "twt": ("twt", ("full", "compressed", "label"), None),
    "single": ("single", ("full", "compressed", "label"), None),
    "all": ("all", ("full", "compressed", "label"), None),
    "no-compression": ("twt", ("label",), "twt/full"),
    "label-only": ("twt", ("label",), None),
}
TARGETS = {"full": "rationale", "compressed": "compressed", "label": "label"}
TITLES = {
    "twt": "TwT, three teachers and both criteria",
    "single": "the best single teacher",
    "all": "without rejection sampling (all answers of all teachers)",
    "no-compression": "without the compression stage",
    "label-only": "the labels alone from the beginning (standard KD)",
}
