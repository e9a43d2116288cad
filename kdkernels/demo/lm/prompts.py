"""Short questions and requests for a chat model, put together from subjects and wordings of our own.

Training and held-out prompts have no subject in common: a keyed hash of the subject (a kettle, a heron, a landslide)
decides on which side all prompts about it lie. They ask for short answers, which a small model can give.
"""

import hashlib
import random
from collections.abc import Iterator

TEST_SHARE = 0.25  # of the subjects, by hash

# what is asked about, and how
SUBJECTS = {
    "things": (
        "a kettle|a ladder|an umbrella|a compass|a hammer|a lantern|a piano|a bicycle pump|a sewing machine|"
        "a telescope|a wheelbarrow|a thermometer|a hammock|a rowing boat|a chessboard|a magnifying glass|a backpack|"
        "a doorbell|a pocket watch|a wooden spoon|a fishing net|a water filter|a paper map|a candle"
    ),
    "animals": (
        "a heron|an otter|a hedgehog|a camel|a woodpecker|an octopus|a beaver|a bat|a snail|a penguin|a wolf|a bee|"
        "a dolphin|a crow|a tortoise|a squirrel|a firefly|a moose|a seahorse|a spider|a swan|a gecko"
    ),
    "jobs": (
        "a baker|a surveyor|a nurse|a plumber|a librarian|a beekeeper|a pilot|a tailor|a gardener|a translator|"
        "a firefighter|a dentist|a bus driver|a carpenter|an electrician|a judge|a shepherd|a stage manager"
    ),
    "events in nature": (
        "a landslide|a rainbow|an eclipse of the sun|a thunderstorm|an earthquake|high tide|the first frost|fog|"
        "a volcanic eruption|a drought|a sandstorm|the melting of a glacier|a waterfall|the northern lights|"
        "a forest fire"
    ),
    "places": (
        "a lighthouse|a night market|a railway station|a village school|a desert|a harbour|an orchard|"
        "a public library|a mountain hut|a greenhouse|a museum|an abandoned mill|a rooftop garden|an airport|"
        "a bakery at dawn|a river bank"
    ),
    "skills": (
        "swimming|baking bread|learning a language|playing chess|drawing a face|growing tomatoes|riding a bicycle|"
        "sleeping better|saving money|writing a letter|running a long distance|remembering names|speaking in public|"
        "keeping a room tidy|packing a suitcase|cooking rice|listening well|waking up early"
    ),
    "occasions": (
        "a wedding|the first day at work|a birthday party|a farewell dinner|moving house|a school play|a job interview|"
        "a picnic by a lake|a long train journey|a rainy weekend|a new year|a family reunion|an exam|a camping trip"
    ),
    "ideas": (
        "gravity|friendship|democracy|inflation|evaporation|patience|recycling|electricity|courage|a budget|"
        "photosynthesis|an echo|luck|a vaccine|honesty|a deadline|magnetism|curiosity|a bank loan|the water cycle"
    ),
}
WORDINGS = {
    "things": (
        "What is {} used for? Answer in one sentence.",
        "Give one short tip for looking after {}.",
        "Write one sentence of a story in which someone finds {}.",
        "Name two things that {} is made of.",
    ),
    "animals": (
        "Where does {} live? Answer briefly.",
        "What does {} eat? One sentence, please.",
        "Tell me one interesting fact about {}.",
        "Write a single line of a children's tale about {}.",
    ),
    "jobs": (
        "What does {} do all day? Answer in one sentence.",
        "Name one skill that {} needs, and say why.",
        "Write one friendly sentence to thank {}.",
    ),
    "events in nature": (
        "In one sentence, how does {} come about?",
        "Describe {} to a child in a few words.",
        "What should people do during {}? Give one piece of advice.",
    ),
    "places": (
        "Describe {} in one sentence.",
        "What might you hear at {}? Answer in one sentence.",
        "Suggest a title for a short story set in {}.",
    ),
    "skills": (
        "Give a beginner one tip for {}.",
        "Why is {} worth the effort? Answer in one sentence.",
        "What is a common mistake in {}? Keep it short.",
    ),
    "occasions": (
        "Write a one-sentence message for {}.",
        "What should I not forget for {}? Name one thing.",
        "Suggest something kind to say at {}, in one sentence.",
    ),
    "ideas": (
        "Explain {} in one simple sentence.",
        "Give an everyday example of {}, briefly.",
        "Why does {} matter? Answer in one sentence.",
    ),
}


def side(subject: str) -> str:
    """`"train"` or `"test"`: decided by a keyed hash of the subject and nothing else."""
    digest = hashlib.blake2b(subject.encode(), key=b"kdkernels prompts split", digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def prompts(of_side: str, seed: int = 0) -> Iterator[str]:
    """All prompts of one side, each once, in a random order that `seed` decides.

    Raises ValueError for another side than "train" and "test".
    """
    if of_side not in ("train", "test"):
        raise ValueError(f'of_side: expected "train" or "test", got {of_side!r}')
    found = [
        wording.format(subject)
        for kind, subjects in SUBJECTS.items()
        for subject in subjects.split("|")
        if side(subject) == of_side
        for wording in WORDINGS[kind]
    ]
    random.Random(f"{of_side} {seed}").shuffle(found)
    yield from found
