"""Rules of the demo data: which captions are clean and which class a picture has.

The rules work on folder names, titles and keywords. scripts/datasets/demo/prepare.py applies them.
"""

import html
import json
import re
from collections import Counter
from pathlib import Path

# Captions written by hand for titles that are not English, too short or misleading
TITLES_FILE = Path(__file__).with_name("titles.json")

# Class -> words that fit "a picture of {}."
CLASSES = {
    "bird": "a bird",
    "building": "a building",
    "clothing": "clothing",
    "device": "an electronic device",
    "drink": "a drink",
    "food": "food on a plate or a sweet",
    "fruit": "a fruit or a vegetable",
    "game": "a sport, a game or a toy",
    "holiday": "a holiday or a party",
    "household": "furniture or a household object",
    "insect": "an insect",
    "instrument": "a musical instrument",
    "mammal": "a mammal",
    "map": "a map",
    "office": "office or school supplies",
    "pattern": "a pattern or an ornament",
    "person": "a person",
    "plant": "a plant or a flower",
    "reptile": "a reptile, a frog or a dinosaur",
    "sea_animal": "a fish or another sea animal",
    "sign": "a road sign or a warning sign",
    "sky": "the sky, the weather or a planet",
    "symbol": "a symbol or an icon",
    "tool": "a tool or a weapon",
    "vehicle": "a car, a ship or another vehicle",
}

# Folder prefix -> class. The longest matching prefix wins; "" drops the folder.
STAMP_FOLDERS = {
    "animals/amphibians": "reptile",
    "animals/birds": "bird",
    "animals/birds/cartoon": "",
    "animals/dinosaur": "reptile",
    "animals/fish": "sea_animal",
    "animals/insects": "insect",
    "animals/lizards": "reptile",
    "animals/mammals": "mammal",
    "animals/mammals/aquatic": "sea_animal",
    "animals/mammals/bears/cartoon": "game",
    "animals/mammals/bears/toys": "game",
    "animals/marsupials": "mammal",
    "animals/shellfish": "sea_animal",
    "clothes": "clothing",
    "food": "food",
    "food/fruit": "fruit",
    "food/nuts": "fruit",
    "food/spices": "fruit",
    "food/vegetables": "fruit",
    "hobbies": "device",
    "hobbies/music": "instrument",
    "household": "household",
    "household/arttools": "office",
    "household/tools": "tool",
    "medical": "tool",
    "military/vehicles": "vehicle",
    "naturalforces": "sky",
    "people": "person",
    "plants": "plant",
    "seasonal": "holiday",
    "space": "sky",
    "sports": "game",
    "sports/cartoon": "",
    "symbols": "",
    "town": "building",
    "town/flags": "symbol",
    "town/roadsigns": "sign",
    "vehicles": "vehicle",
}
CLIPART_FOLDERS = {
    "animals": "mammal",
    "animals/birds": "bird",
    "animals/bugs": "insect",
    "animals/dinosaurs": "reptile",
    "animals/fantasy": "person",
    "animals/fish": "sea_animal",
    "buildings": "building",
    "buildings/furniture": "household",
    "buttons": "symbol",
    "computer": "device",
    "computer/buttons": "symbol",
    "computer/folders": "office",
    "computer/icons": "symbol",
    "computer/icons/etiquette-theme": "",
    "computer/icons/flat-theme": "",
    "computer/icons/lemon-theme": "",
    "containers": "household",
    "decorations": "pattern",
    "education": "office",
    "electronics": "device",
    "food": "food",
    "food/beverages": "drink",
    "food/fruit": "fruit",
    "food/vegetables": "fruit",
    "geography": "map",
    "geography/astronomy": "sky",
    "logos": "symbol",
    "office": "office",
    "office/telephone": "device",
    "people": "person",
    "people/clothing": "clothing",
    "plants": "plant",
    "recreation": "game",
    "recreation/games/cards": "",
    "recreation/holiday": "holiday",
    "recreation/music": "instrument",
    "recreation/party": "holiday",
    "recreation/religion": "symbol",
    "science": "tool",
    "science/astronomy": "sky",
    "shapes": "symbol",
    "shapes/arrows": "",
    "shapes/flowchart": "",
    "shapes/jigsaw": "",
    "shapes/stars": "",
    "signs_and_symbols": "symbol",
    "signs_and_symbols/clocks": "household",
    "signs_and_symbols/flags": "",
    "signs_and_symbols/hazard": "sign",
    "signs_and_symbols/money": "household",
    "signs_and_symbols/weather": "sky",
    "special": "",
    "special/patterns": "pattern",
    "tools": "tool",
    "transportation": "vehicle",
    "transportation/roadsigns": "sign",
}
# Folders with mixed content: keywords and title words determine the class (WORD_CLASSES, in this order) before the
# folder does
MIXED_FOLDERS = (
    "animals",
    "computer",
    "computer/icons",
    "electronics",
    "food",
    "geography",
    "office",
    "recreation",
    "recreation/music",
    "shapes",
    "signs_and_symbols",
    "tools",
    "transportation",
    "transportation/boating",
)
WORD_CLASSES = {
    "roadsign": "sign",
    "caution": "sign",
    "warning": "sign",
    "mapsym": "symbol",
    "hotel": "symbol",
    "musicsym": "symbol",
    "flags": "",
    "flag": "",
    "bird": "bird",
    "penguin": "bird",
    "insect": "insect",
    "mosquito": "insect",
    "reptile": "reptile",
    "frog": "reptile",
    "lizard": "reptile",
    "snake": "reptile",
    "seal": "sea_animal",
    "crawfish": "sea_animal",
    "map": "map",
    "globe": "map",
    "gps": "device",
    "planet": "sky",
    "moon": "sky",
    "weather": "sky",
    "cloud": "sky",
    "fruit": "fruit",
    "mushroom": "fruit",
    "vegetable": "fruit",
    "beverage": "drink",
    "drink": "drink",
    "weapon": "tool",
    "phone": "device",
    "camera": "device",
    "knot": "tool",
}

# Titles that name a series or an author instead of the picture; the file name is used instead
GENERIC = re.compile(
    r"^clip ?art by|^various clip|icon ?theme|icon ?set|-theme$|flat icon|sibmission|^advertising$"
    r"|^card$|^people$|^stick man$|r15 general|map symbols|aiga|etiquette icons|architetto francesco",
    re.IGNORECASE,
)
SERIES = 4  # a title of at least this many pictures is the name of a series
# File names of icon themes, and the author's name at the end of newer file names
NOISE_FILE = re.compile(r"^(bb|gnome|70a|sm|cm|ppl|buddy|base|spain)[_\d-]|zazou$|_symbol_\d", re.IGNORECASE)
NOISE_KEYWORDS = re.compile(
    r"hash|^0x|http|@|^\d+$|^.{1,2}$|.{18,}|unsorted|^signs|[_.]|^cv-|openclipart|clip ?art|architetto"
    r"|rollandin|inkscape|^menu$|sodipodi|^icons?$|^symbols?$|mapsym|musicsym|networksym|appicon|musicstuff"
    r"|^shape$|^recreation$|^religholiday$|airtravel|roadtravel|weathersym|^animali$|^felini$",
    re.IGNORECASE,
)
NOISE_DESCRIPTION = re.compile(
    r"hash\(|@|http|www|created? with|made with|inkscape|sodipodi|^part of|converted|clip ?art|deriv"
    r"|public domain|<|\bmy |contact|i drew|i made|a simple map|enjoy|submission|license|autotraced"
    r"|vectori[sz]|jpeg|svg|nice|normal |based on|easily|ideal|hate|this (picture|one|image)|logo|edited"
    r"|\b(uma?|de|del|delle|della|di|da|une?|para|este|por|les|pesca|e)\b|\[",
    re.IGNORECASE,
)
ARTICLES = {"a", "an", "the"}
TYPOGRAPHIC = {
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: " - ",
    0x2026: "...",
    0xB4: "'",
    0x60: "'",
}


def folder_class(folder: str, table: dict[str, str]) -> str | None:
    """Return the class of the longest prefix of `folder` in the table, or None."""
    names = folder.split("/")
    for length in range(len(names), 0, -1):
        if (prefix := "/".join(names[:length])) in table:
            return table[prefix]
    return None


def stamp_class(folder: str) -> str:
    """Return the class of a tuxpaint folder, or "" to drop its stamps."""
    return folder_class(folder, STAMP_FOLDERS) or ""


def clipart_class(folder: str, words: list[str]) -> str:
    """Return the class of an openclipart picture: by keywords in mixed folders, otherwise by folder."""
    by_folder = folder_class(folder, CLIPART_FOLDERS)
    if by_folder == "":
        return ""
    if folder in MIXED_FOLDERS:
        present = {word.lower() for word in words}
        for word, label in WORD_CLASSES.items():
            if word in present or f"{word}s" in present:
                return label
    return by_folder or ""


# --- captions ------------------------------------------------------------------------------------


def plain_text(text: str) -> str:
    """Unescape entities (twice: some are escaped twice), replace typographic quotes, and collapse spaces."""
    text = html.unescape(html.unescape(text)).translate(TYPOGRAPHIC)
    return re.sub(r"\s+", " ", text).strip()


def tidy_title(title: str) -> str:
    """Convert a title or file name to words: "tigre03" -> "tigre", "corn_dog_bw" -> "corn dog (black and white)"."""
    title = re.sub(r"\.(svg|png)$", "", plain_text(title))
    title = re.sub(r"^(clip ?art by [^-]*-|aiga_)\s*", "", title, flags=re.IGNORECASE)
    title, in_black = re.subn(r"\(?\bb *(?:and|&|_) *w\b\)?|[ _(]bw\b\)?", " ", title, flags=re.IGNORECASE)
    title = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", title.replace("_", " "))
    title = re.sub(r"(?<=\w)-(?=\w)", " ", title) if " " not in title else title
    title = re.sub(r"\b(aj|md|nicu bucu\w*|ganson|openclip\w*|v0[ .]1)\b", "", title)
    title = re.sub(r"^\d{2} ?(?=[a-z]{4})", "", title)
    title = re.sub(r"(?<=[A-Za-z]{3})[ #-]*#?\d{1,3}(?=\s*$| pattern$|\))", "", title)
    title = re.sub(r"\s+", " ", title).strip(" -_.,:;|")
    return f"{title} (black and white)" if in_black and title else title


def is_words(title: str) -> bool:
    """Return whether a title is suitable as a caption: it contains a word of three letters and is not a code."""
    return bool(re.search(r"[A-Za-z]{3}", title)) and len(title) <= 90 and not re.search(r"@|https?:", title)


def caption_key(caption: str) -> str:
    """Return a key for equal captions: case, punctuation, articles and a plural s are ignored."""
    words = re.findall(r"[a-z0-9]+", caption.lower())
    return " ".join(
        word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words if word not in ARTICLES
    )


def stamp_captions(text: str) -> list[str]:
    """Return the first sentence of the English line of a tuxpaint text file and, if longer, the whole line."""
    lines = text.splitlines()
    whole = plain_text(lines[0]) if lines else ""
    first = re.match(r"[^.!?]+[.!?]+(?=\s|$)", whole)
    short = first.group(0) if first else whole
    return [short] if short == whole else [short, whole]


def clipart_title(title: str, file_stem: str, counts: Counter[str]) -> str:
    """Return the title if it is specific, otherwise the file name, or "" if neither is usable."""
    repeated = counts[title.lower()] >= SERIES
    if title and not repeated and not GENERIC.search(title):
        return tidy_title(title) if is_words(tidy_title(title)) else ""
    if repeated and not GENERIC.search(title) and file_stem.lower().startswith(file_name_start(title)):
        return tidy_title(title)  # "hummer_03", one of five titled "hummer": the title describes the picture
    words = tidy_title(file_stem)
    is_code = re.search(r"\d|\b[A-Za-z]\b", words) or NOISE_FILE.search(file_stem)
    return words if is_words(words) and not is_code else ""


def file_name_start(title: str) -> str:
    """Return the start of the file name that openclipart derives from a title."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower())[:12].strip("_") or "?"


def clipart_captions(title: str, description: str, keywords: list[str]) -> list[str]:
    """Return the title and, if informative, a second caption with the description or the keywords."""
    description = re.split(r"(?<=[.!?])\s", plain_text(description))[0]
    is_clean = description.isascii() and not NOISE_DESCRIPTION.search(description)
    is_new = caption_key(tidy_title(description)) not in caption_key(title)
    if 3 <= len(description.split()) <= 25 and is_clean and is_new:
        return [title, description]
    title_key = caption_key(title)
    extra = [
        word
        for word in dict.fromkeys(plain_text(k).lower() for k in keywords)
        if not NOISE_KEYWORDS.search(word)
    ]
    extra = [word for word in extra if word.isascii() and caption_key(word) not in title_key][:4]
    return [title, f"{title}: {', '.join(extra)}"] if extra else [title]


def read_titles() -> dict[str, tuple[str, str]]:
    """Read {lower-case title or file name: (caption or "" to drop, class or "" for the folder's class)}."""
    table = json.loads(TITLES_FILE.read_text(encoding="utf-8"))
    return {title: (caption, label) for title, (caption, label) in table.items()}
