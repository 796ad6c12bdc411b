"""What signs can say: common English words of three letters, which is what fits. Training draws one in three of them."""

from __future__ import annotations

_LISTED = """
    ace act add age ago aid aim air all and ant any ape apt arc are ark arm art ash ask ate awe axe
    bad bag ban bar bat bay bed bee beg bet bib bid big bin bit bow box boy bud bug bun bus but buy
    cab can cap car cat cob cod cog cot cow coy cry cub cue cup cut dad day den dew did dig dim dip doe dog dot dry due dug duo
    ear eat eel egg ego elf elk elm emu end era eve eye fab fan far fax fed fee few fig fin fir fit fix fly foe fog for fox fry fun fur
    gap gas gem get gnu got gum gut guy had ham has hat hay hen her hid him hip his hit hop hot how hub hug hum hut
    ice icy ill imp ink inn ion its ivy jab jam jar jaw jay jet job jog jot joy jug keg key kid kit koi
    lab lap law lay led leg let lid lip lit log lot low mad man map mat may men met mix mob mom mop mud mug
    nap net new nod nor not now nut oak oar oat odd off oil old one opt orb ore our out owe owl own
    pad pal pan paw pay pea pen pet pie pig pin pit pod pop pot pro pub pup put rag ram ran rat raw ray rib rid rim rip rod row rub rug run
    rye sad sap sat saw say sea see set she shy sip sir sit six ski sky sly sob son soy spa spy sum sun
    tab tag tan tap tar tax tea ten the tie tin tip toe ton too top tow toy try tub tug two
    urn use van vat vet vow wag war was wax way web wet who why wig win wit wok won yak yam yes yet you zip zoo
"""
WORDS: tuple[str, ...] = tuple(_LISTED.split())
DRAWN = WORDS[1::3]
