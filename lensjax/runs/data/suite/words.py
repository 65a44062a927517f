"""The words of the suite: all lower-case English, no word in two lists, 452 in all."""

from typing import Final


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES: Final = _listed(
    """
    anchor apron arrow atlas autumn badge bamboo banjo barrel basket beacon beetle bench bishop blanket blossom
    boulder bridge bronze bucket buffalo butter button cabin cactus camel candle canoe canyon carpet castle cedar
    cellar chapel cherry chimney circus clover cobalt comet copper coral cotton cradle crane crater cricket crown
    curtain cypress dagger daisy desert diamond dolphin donkey dragon eagle easel elbow ember engine falcon feather
    fiddle finger flute forest fossil fountain galaxy garden garlic gazelle ginger glacier goblet granite guitar
    hammer harbor harvest hazel helmet heron hollow honey ivory jacket jasmine jungle kettle kitten ladder lagoon
    lantern laurel lemon lizard lotus magnet mango maple marble meadow melon mirror monkey mosaic napkin needle
    nickel nutmeg oasis ocean olive onion orchid otter oyster paddle palace panther parrot pebble pepper
    """
)
"""What is asked for."""

VALUES: Final = _listed(
    """
    acorn amber apricot arena aspen attic bakery balcony ballad barley basil beaver berry bison bonnet border
    bottle bracelet breeze broom bubble bugle bundle cabbage cable camera canvas carrot cavern chalk charcoal
    chariot cinder cloak coconut collar compass cottage crate crayon crystal cushion dawn denim dewdrop dome draper
    drum dune dusk echo elm emerald fable fennel ferry fig flint foam fox frost gate gem geyser globe glove grape
    gravel grove gull hatchet hedge hill hinge hive hood horn hut iris island ivy jade jar jewel juniper kayak kelp
    key kite knot lake lamp lark leaf ledge lily lime linen lion loom lynx mast mill mint mist moss moth mule
    myrtle nest oak oar opal orbit owl pansy pear pearl pecan petal pier pine plum pond poppy prism puma quail
    quartz quill quilt rabbit radish raft raven reef ribbon robin rose
    """
)
"""What the answers are."""

ADJECTIVES: Final = _listed(
    """
    ancient bitter brave bright broad calm careful cheap clever cold costly cool crisp dark deep dry early empty
    faint famous fast fine firm flat fresh gentle grand great happy heavy hidden high huge kind large late lazy
    light little lonely long loud lucky mild modern narrow new noble odd old plain polite proud pure quick quiet
    rare rich
    """
)
NOUNS: Final = _listed(
    """
    actor artist author baker banker barber butcher captain carpenter clerk coach cook cousin dancer dentist doctor
    driver editor farmer father fisher friend gardener guard guest hunter judge king knight lawyer mason mayor
    merchant miller miner mother nurse officer painter pilot plumber poet porter priest prince queen rider sailor
    scholar sheriff singer sister soldier tailor teacher uncle waiter weaver
    """
)
VERBS: Final = _listed(
    """
    admires answers avoids blames calls carries catches chases cheers cleans copies counts cures doubts draws
    envies feeds finds follows forgets greets guides hears helps hires holds hugs invites joins judges keeps knows
    leads leaves likes loves meets misses needs obeys offers pays praises pulls pushes reads rescues sees sends
    serves shows teaches tells thanks trusts visits wakes warns
    """
)
"""Of the sentences that fill a text: nothing is ever asked of them."""

GRAMMAR: Final = ("the", "of", "is", "code", "now", "and", "value", "most", "common", "frequent", "words", ".", ":")

VOCABULARY: Final = (*GRAMMAR, *NAMES, *VALUES, *ADJECTIVES, *NOUNS, *VERBS)
"""Token ids of the word form, by place."""
