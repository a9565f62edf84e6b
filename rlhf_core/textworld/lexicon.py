"""The words of the text world: what a review can be about, and what can be said about it.

Every phrase carries a *valence*, its contribution to the latent quality of a review: about +1 is a rave, about -1 a
pan. Braces mark agreement with the subject, so that one entry serves "the song soars" and "the songs soar":

    {s} drags|drag   {es} goes|go   {ies} carries|carry   {is} is|are   {its} its|their
"""

from typing import Final

SINGULAR: Final = {"s": "s", "es": "es", "ies": "ies", "is": "is", "its": "its"}
PLURAL: Final = {"s": "", "es": "", "ies": "y", "is": "are", "its": "their"}

GENRES: Final = (  # noqa: SIM905 - two dozen names read better in running text
    "western,heist movie,ghost story,space opera,courtroom drama,road movie,spy thriller,musical,family film,"
    "zombie comedy,war film,first feature,sequel,remake,love story,biopic,monster movie,slasher,fairy tale,"
    "sports movie,holiday film,disaster movie,puppet film,silent film"
).split(",")

# What stands before the subject of a prompt; "{genre}" stands for each of GENRES in turn.
FRAMES: Final = (
    "",
    "for a {genre} ,",
    "to be fair ,",
    "say what you will ,",
    "on a second viewing ,",
    "by the end ,",
    "from the first frame ,",
    "seen on a big screen ,",
    "two hours later ,",
    "despite the trailer ,",
    "at this budget ,",
    "with the sound up ,",
    "in a crowded theater ,",
    "as always with this director ,",
    "unlike the novel ,",
    "for once ,",
    "strange to say ,",
    "all in all ,",
    "in the end ,",
    "on a rainy sunday ,",
    "fans will say that",
    "i must admit that",
    "my sister insists that",
    "critics agree that",
    "i keep thinking that",
    "nobody told me that",
    "the poster promises that",
    "it turns out that",
    "you can tell that",
)

# kind -> (singular subjects, plural subjects); the kind decides which verbs and adjectives fit.
SUBJECTS: Final = {
    "people": (
        "the cast,the lead,the villain,the acting,the old detective,the love interest,the comic relief",
        "the two leads,the child actors,the supporting players,the performances",
    ),
    "words": (
        "the script,the dialogue,the plot,the story,the humor,the romance,the premise",
        "the jokes,the one-liners,the speeches",
    ),
    "pace": (
        "the pacing,the second act,the opening hour,the finale,the first half,the editing,the middle stretch",
        "the chase scenes,the flashbacks,the last ten minutes",
    ),
    "look": (
        "the camera work,the lighting,the cinematography,the set design,the animation",
        "the costumes,the visual effects,the wide shots,the colors",
    ),
    "sound": (
        "the score,the soundtrack,the music,the sound design,the title song",
        "the songs,the drums,the musical numbers",
    ),
}

VERBS: Final = {
    "any": {
        "deserve{s} an award": 1.0,
        "steal{s} the film": 0.9,
        "hold{s} up": 0.4,
        "do{es} the job": 0.3,
        "get{s} by": 0.2,
        "pass{es} the time": 0.2,
        "miss{es} a beat or two": -0.2,
        "need{s} a polish": -0.3,
        "come{s} and go{es}": -0.3,
        "lose{s} steam": -0.4,
        "leave{s} you cold": -0.7,
        "ruin{s} the mood": -0.9,
    },
    "people": {
        "light{s} up every scene": 0.9,
        "carr{ies} the whole picture": 0.8,
        "break{s} your heart": 1.0,
        "hold{s} the screen": 0.7,
        "earn{s} every laugh": 0.8,
        "find{s} real tenderness": 0.8,
        "never put{s} a foot wrong": 0.9,
        "sleepwalk{s} through it all": -0.8,
        "never find{s} a pulse": -0.8,
        "mistake{s} shouting for feeling": -0.9,
        "recite{s} every line": -0.6,
        "look{s} bored": -0.7,
    },
    "words": {
        "crackle{s} with wit": 0.9,
        "trust{s} the audience": 0.7,
        "keep{s} you guessing": 0.8,
        "sing{s}": 1.0,
        "earn{s} {its} tears": 0.9,
        "say{s} something true": 0.8,
        "creak{s}": -0.6,
        "go{es} nowhere": -0.9,
        "borrow{s} from better films": -0.7,
        "explain{s} far too much": -0.6,
        "insult{s} the audience": -1.0,
        "run{s} out of ideas": -0.8,
        "make{s} no sense": -0.9,
    },
    "pace": {
        "fl{ies} by": 0.8,
        "grip{s} from start to end": 0.9,
        "build{s} with real patience": 0.7,
        "pay{s} off beautifully": 1.0,
        "never waste{s} a minute": 0.9,
        "leave{s} you breathless": 1.0,
        "drag{s}": -0.7,
        "wander{s} off": -0.6,
        "test{s} your patience": -0.8,
        "outstay{s} {its} welcome": -0.7,
        "feel{s} like homework": -0.9,
        "grind{s} to a halt": -0.9,
        "lose{s} the thread": -0.6,
    },
    "look": {
        "glow{s}": 0.8,
        "dazzle{s}": 0.9,
        "reward{s} the big screen": 0.7,
        "fill{s} the frame with wonder": 1.0,
        "look{s} like a painting": 0.9,
        "turn{s} rain into poetry": 1.0,
        "look{s} cheap": -0.8,
        "hurt{s} the eyes": -0.9,
        "belong{s} on television": -0.6,
        "show{s} every seam": -0.6,
        "drown{s} in gray": -0.7,
        "scream{s} for attention": -0.7,
    },
    "sound": {
        "soar{s}": 0.9,
        "swell{s} at just the right moment": 0.9,
        "give{s} you goosebumps": 1.0,
        "linger{s} for days": 0.8,
        "hum{s} with life": 0.8,
        "know{s} when to be silent": 0.7,
        "lift{s} every scene": 0.8,
        "drown{s} out the dialogue": -0.8,
        "never shut{s} up": -0.9,
        "grate{s}": -0.7,
        "telegraph{s} every scare": -0.6,
        "beg{s} for tears": -0.7,
        "sound{s} half asleep": -0.6,
    },
}

ADJECTIVES: Final = {
    "any": {
        "wonderful": 1.0,
        "superb": 1.0,
        "delightful": 0.9,
        "lovely": 0.8,
        "charming": 0.8,
        "memorable": 0.8,
        "graceful": 0.7,
        "inventive": 0.7,
        "confident": 0.6,
        "pleasant": 0.5,
        "solid": 0.4,
        "decent": 0.3,
        "passable": 0.1,
        "dreadful": -1.0,
        "awful": -1.0,
        "lifeless": -0.9,
        "dull": -0.8,
        "clumsy": -0.7,
        "stale": -0.7,
        "flat": -0.7,
        "tired": -0.6,
        "forgettable": -0.6,
        "thin": -0.5,
        "uneven": -0.4,
        "ordinary": -0.3,
        "unremarkable": -0.2,
    },
    "people": {"magnetic": 1.0, "warm": 0.7, "wooden": -0.8, "miscast": -0.7},
    "words": {"witty": 0.9, "sharp": 0.7, "contrived": -0.7, "predictable": -0.6},
    "pace": {"gripping": 0.9, "brisk": 0.6, "sluggish": -0.7, "endless": -0.8},
    "look": {"gorgeous": 1.0, "luminous": 0.9, "murky": -0.6, "ugly": -0.9},
    "sound": {"haunting": 0.9, "playful": 0.7, "shrill": -0.8, "syrupy": -0.6},
}

# Adverb -> factor on the valence of the adjective behind it.
PRAISING_ADVERBS: Final = {
    "quietly": 1.0,
    "gloriously": 1.4,
    "genuinely": 1.2,
    "effortlessly": 1.1,
    "disarmingly": 1.1,
}
PANNING_ADVERBS: Final = {
    "painfully": 1.4,
    "hopelessly": 1.4,
    "needlessly": 1.1,
    "oddly": 0.9,
    "a little": 0.6,
}
ADVERBS: Final = {"truly": 1.3, "really": 1.2, "simply": 1.1, "rather": 0.8, "mostly": 0.7, "often": 0.8}
NEGATIONS: Final = {
    "not": -0.5,
    "not exactly": -0.5,
    "hardly": -0.6,
    "never": -0.7,
    "far from": -0.8,
    "anything but": -0.9,
}

# Said after a predicate, between commas -> factor on its valence.
HEDGES: Final = {
    "i suppose": 0.6,
    "at least in places": 0.6,
    "more or less": 0.7,
    "for the most part": 0.75,
    "most of the time": 0.75,
    "if i am honest": 1.0,
    "to my surprise": 1.1,
    "believe it or not": 1.1,
}

# Joiner -> (weight of the clause before it, weight of the clause after it). A contrast puts its weight on what
# follows ("dull , but lovely" ends well); a concession puts it on what came first ("lovely , though dull").
AGREEING: Final = {
    ", and": (1.0, 1.0),
    ", and even": (1.0, 1.1),
    ", just as": (1.0, 1.0),
    "; besides ,": (1.0, 0.9),
}
TURNING: Final = {
    ", but": (0.7, 1.3),
    ", yet": (0.8, 1.2),
    "; still ,": (0.7, 1.3),
    ", though": (1.2, 0.7),
    ", even if": (1.2, 0.6),
}

# A closing sentence; it agrees with the sign of what was said before.
VERDICTS: Final = {
    "worth every penny": 1.0,
    "a small gem": 0.9,
    "go see it tonight": 1.0,
    "i left with a smile": 0.8,
    "i would watch it again tomorrow": 0.9,
    "bring a friend": 0.6,
    "worth a rainy afternoon": 0.4,
    "better than the trailer": 0.3,
    "fine for a long flight": 0.2,
    "not for everyone": -0.3,
    "a missed chance": -0.5,
    "i wanted to like it": -0.5,
    "wait for the rerun": -0.6,
    "i left early": -0.9,
    "i checked my watch twice": -0.8,
    "save your money": -0.9,
    "what a waste": -1.0,
}
