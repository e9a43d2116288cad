"""What the rehearsal compares."""

from kdkernels.demo.phases import RECIPES

HERE = RECIPES / "twt"
# of the teachers: so that they differ and each is of use, chosen by their own answers to the queries, never by an arm's
STEPS = {"equations": 400, "sentences": 600, "values": 550}
BEST = "equations"  # the teacher that is most often right
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
