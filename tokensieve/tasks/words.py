"""The words that needles are made of: keys, and the salad around them."""

ADJECTIVES = tuple(
    """amber ancient arctic ashen autumn azure bold brass brave bright brisk broad bronze calm candid careful cedar
    chalky cheerful civil clear clever cloudy coastal cobalt cold cool copper coral cosmic cozy crimson crisp
    curious daring dark dapper deep dense distant dusty eager early earnest easy eastern elder electric emerald
    empty endless exotic faded faint fair famous fancy fast fierce final fine floral fluffy flying foggy fond formal
    free fresh friendly frosty frozen gentle giant gilded glad glass gleaming global golden grand grassy gray great
    green happy hardy hasty hazel heavy hidden high hollow honest humble humid hungry icy idle indigo inner iron
    ivory jade jolly jovial keen kind large late lazy leafy lemon level light lilac little lively local lofty lone
    long loud lucky lunar magenta major maple marble mellow merry mighty mild minor misty modern modest mossy muted
    narrow navy neat nimble noble north northern novel oak ocean odd olive opal open orange outer pale patient pearl
    pearly perfect pine pink plain playful polar polite prime proud purple quick quiet rapid rare ready red regal
    remote rich ripe rocky rosy rough round royal ruby rustic rusty sage salty sandy scarlet secret serene shady
    sharp shiny short shy silent silken silver simple single sleepy slow small smooth snowy soft solar solid sonic
    southern spare spicy spry square stable steady steel stormy strong sturdy subtle sunny super sweet swift tall
    tame teal tender tidy tiny tranquil true upper urban vast velvet violet vivid warm wary wavy western white wide
    wild windy winter wise witty wooden woven yellow young zesty""".split()
)
THINGS = tuple(
    """acorn anchor antler apple arrow aspen atlas badger banjo barley basin basket beacon bear beaver bell berry birch
    bison blossom boat bottle boulder bridge brook bucket buffalo cabin cactus camel candle canoe canyon castle cat
    cedar cello cherry chisel cliff clock cloud clover coast comet compass condor copper coral cottage cougar cove
    crane crater creek cricket crow crown cypress daisy deer delta desert dolphin donkey dove dragon drum duck dune
    eagle echo elk elm ember falcon fern ferry fiddle field finch fjord flame flute forest fossil fountain fox frog
    galaxy garden garnet gazelle gecko geyser ginger glacier goose grove gull hammer harbor hare harp hawk hazel
    heron hill hornet horse island ivy jaguar jasmine kayak kettle kite koala lagoon lake lantern lark laurel ledge
    lemur leopard lilac lily lion lizard llama lobster lotus lynx magpie mango maple marlin marsh meadow meteor mill
    mirror moon moose moss moth mountain mouse nebula needle nest oak oasis ocean orbit orchard orchid osprey otter
    owl oyster panda panther parrot peach peacock pebble pelican penguin pepper petal piano pigeon pine planet
    plateau plum pond poplar poppy prairie prism puffin puma quail quartz quilt rabbit raccoon radish raven reef
    ridge river robin rocket rose sail salmon sandal sapphire saturn seal shark shell shore shrike sparrow spider
    spruce squid stag star stone stork storm stream summit swallow swan tiger timber toad tower trail trout tulip
    tunnel turtle valley violin viper walnut walrus warbler water whale wheat willow wind wolf wren yacht
    zebra""".split()
)

# Everyday words, and the pieces of words that do not exist.
SALAD = tuple(
    """a about after again all also always and any anyone are as ask at away back be because been before below best
    better between both but by call can case change check come could day did do does done down each early else end
    enough even ever every everyone far few final find first follow found from get give go good had has have he help
    her here high him his how however if in into is it its just keep kind know last later least left less let like
    list little long look made make many may maybe me mean mind more most move much must my name near need never new
    next no not nothing now of off often old on once one only open or other our out over own page part people
    perhaps place plan please point quite rather read ready really right said same say search see seem send set
    several shall she should show since so some soon state still stop such sure take tell text than that the their
    them then there these they thing think this those though time to today together too took try turn two under
    until up upon us use very want was way we week well went were what when where whether which while who whole why
    will with within without word work would write year yes yet you your answer ask asked belongs confirmed describe
    document entry file given goes group holds inform kept known letter line listing manual mention noted owner
    paper person record refer remind reply report request require shown stands stored table team told value wanted
    warehouse cabinet drawer shelf office folder archive desk""".split()
)
SYLLABLES = tuple(
    onset + rhyme
    for onset in "b c d f g h j k l m n p r s t v w z ch sh th tr st pl".split()
    for rhyme in "a e i o u an er in on us".split()
)
