"""Everyday words and what they mean alike, in a few languages: how a person's words become a model's own.

Public and written by hand; it knows no model. A meaning helps only where the model at hand has a word of it, so "huge"
becomes "large" for one model and is unknown to another. Which language a text is in is decided by its script and by a
list of small words: good for a sentence, a guess for two words, and "und" (undetermined) where neither says.
Not covered: grammar, irony, words with several meanings, and nearly every language there is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

UNDETERMINED = "und"

# kind.name: words in English | de: German | ... ~ names of near meanings, nearest first; indented lines go on.
# A name with a number in front, such as size.1-small, stands on a scale: "larger" goes up it.
_TABLE = """
colour.red: red crimson scarlet ruby vermilion | de: rot | fr: rouge | es: rojo roja | it: rosso rossa | pt:
    vermelho vermelha | nl: rood rode | zh: 红 紅 | ja: 赤 | ar: أحمر حمراء | ru: красный красная красное | he: אדום
    אדומה ~ orange pink brown
colour.green: green emerald lime olive | de: grün | fr: vert verte | es: verde | it: verde | pt: verde | nl: groen
    groene | zh: 绿 綠 | ja: 緑 | ar: أخضر خضراء | ru: зелёный зеленый зелёная зеленая | he: ירוק ירוקה ~ turquoise
    yellow
colour.blue: blue navy azure cobalt sapphire | de: blau | fr: bleu bleue | es: azul | it: blu azzurro azzurra | pt:
    azul | nl: blauw blauwe | zh: 蓝 藍 | ja: 青 | ar: أزرق زرقاء | ru: синий синяя голубой голубая | he: כחול כחולה ~
    turquoise purple
colour.yellow: yellow golden gold lemon | de: gelb | fr: jaune | es: amarillo amarilla | it: giallo gialla | pt:
    amarelo amarela | nl: geel gele | zh: 黄 黃 | ja: 黄 | ar: أصفر صفراء | ru: жёлтый желтый жёлтая желтая | he: צהוב
    צהובה ~ orange
colour.purple: purple violet lilac mauve | de: lila violett | fr: violet violette | es: morado morada violeta
    púrpura | it: viola | pt: roxo roxa | nl: paars paarse | zh: 紫 | ja: 紫 | ar: بنفسجي بنفسجية أرجواني | ru:
    фиолетовый фиолетовая | he: סגול סגולה ~ pink blue
colour.orange: orange tangerine | de: orange | fr: orange | es: naranja | it: arancione | pt: laranja | nl: oranje |
    zh: 橙 | ja: 橙 | ar: برتقالي برتقالية | ru: оранжевый оранжевая | he: כתום כתומה ~ yellow red
colour.pink: pink rose magenta fuchsia | de: rosa pink | fr: rose | es: rosa rosado rosada | it: rosa | pt: rosa |
    nl: roze | zh: 粉 | ar: وردي وردية | ru: розовый розовая ~ purple red
colour.brown: brown chestnut chocolate | de: braun | fr: brun brune marron | es: marrón | it: marrone | pt: marrom |
    nl: bruin bruine | zh: 棕 | ja: 茶 | ar: بني بنية | ru: коричневый коричневая ~ orange red
colour.turquoise: turquoise cyan teal aqua | de: türkis | fr: turquoise cyan | es: turquesa | it: turchese | nl:
    turkoois ~ blue green
colour.black: black ebony | de: schwarz | fr: noir noire | es: negro negra | it: nero nera | pt: preto preta | nl:
    zwart zwarte | zh: 黑 | ja: 黒 | ar: أسود سوداء | ru: чёрный черный чёрная черная чёрном черном | he: שחור שחורה ~
    grey
colour.white: white ivory | de: weiß | fr: blanc blanche | es: blanco blanca | it: bianco bianca | pt: branco branca
    | nl: wit witte | zh: 白 | ja: 白 | ar: أبيض بيضاء | ru: белый белая белом | he: לבן לבנה ~ grey
colour.grey: grey gray silver | de: grau | fr: gris grise | es: gris | it: grigio grigia | pt: cinza cinzento | nl:
    grijs grijze | zh: 灰 | ja: 灰 | ar: رمادي رمادية | ru: серый серая ~ black white
colour.dark: dark dim | de: dunkel | fr: sombre foncé foncée | es: oscuro oscura ~ black
colour.light: light bright pale | de: hell | fr: clair claire | es: claro clara ~ white

size.1-small: small little tiny teeny wee mini minute | de: klein winzig | fr: petit petite | es: pequeño
    pequeña chico chica | it: piccolo piccola | pt: pequeno pequena | nl: klein kleine | zh: 小 | ja: 小 | ar:
    صغير صغيرة | ru: маленький маленькая маленькое | he: קטן קטנה
size.2-medium: medium middling | de: mittelgroß mittel | fr: moyen moyenne | es: mediano mediana | it: medio media |
    pt: médio média | zh: 中 | ja: 中
size.3-large: large big great huge giant enormous massive | de: groß riesig | fr: grand grande | es: grande gran |
    it: grande | pt: grande | nl: groot grote | zh: 大 | ja: 大 | ar: كبير كبيرة | ru: большой большая большое | he:
    גדול גדולה

shape.circle: circle round circular disc disk ball dot | de: kreis rund scheibe | fr: cercle rond ronde disque | es:
    círculo redondo redonda | it: cerchio tondo tonda | pt: círculo redondo | nl: cirkel rond ronde | zh: 圆 圓 | ja:
    円 丸 | ar: دائرة | ru: круг | he: עיגול ~ ellipse
shape.ellipse: ellipse oval egg | de: ellipse oval | fr: ellipse ovale | es: elipse óvalo ~ circle
shape.square: square box block | de: quadrat viereck | fr: carré carrée | es: cuadrado cuadrada | it: quadrato
    quadrata | pt: quadrado quadrada | nl: vierkant | zh: 方 | ja: 四 | ar: مربع | ru: квадрат | he: ריבוע ~ rectangle
shape.rectangle: rectangle rectangular oblong | de: rechteck | fr: rectangle | es: rectángulo ~ square
shape.hexagon: hexagon pentagon octagon polygon | de: sechseck fünfeck | fr: hexagone | es: hexágono ~ circle square
shape.triangle: triangle triangular | de: dreieck | fr: triangle | es: triángulo | it: triangolo | pt: triângulo |
    nl: driehoek | zh: 角 | ja: 三 | ar: مثلث | ru: треугольник | he: משולש ~ pyramid
shape.pyramid: pyramid cone ~ triangle
shape.star: star starry pentagram | de: stern | fr: étoile | es: estrella | it: stella | pt: estrela | nl: ster |
    zh: 星 | ja: 星 | ar: نجمة | ru: звезда звёздочка | he: כוכב
shape.heart: heart | de: herz | fr: cœur coeur | es: corazón | it: cuore | pt: coração | zh: 心 | ar: قلب | ru:
    сердце
shape.diamond: diamond rhombus | de: raute | fr: losange | es: rombo ~ square
shape.cube: cube dice | de: würfel | fr: cube | es: cubo ~ square
shape.sphere: sphere globe bubble | de: kugel | fr: sphère boule | es: esfera ~ circle

part.background: background backdrop | de: hintergrund grund | fr: fond | es: fondo | it: sfondo | pt: fundo | nl:
    achtergrond | zh: 背 | ja: 背 | ar: خلفية | ru: фон фоне | he: רקע

digit.0: 0 zero nought | de: null | fr: zéro | es: cero | zh: 零
digit.1: 1 one | de: eins | es: uno | zh: 一
digit.2: 2 two | de: zwei | fr: deux | es: dos | it: due | zh: 二
digit.3: 3 three | de: drei | fr: trois | es: tres | it: tre | zh: 三
digit.4: 4 four | de: vier | fr: quatre | es: cuatro | it: quattro | zh: 四
digit.5: 5 five | de: fünf | fr: cinq | es: cinco | it: cinque | zh: 五
digit.6: 6 six | de: sechs | fr: six | es: seis | it: sei | zh: 六
digit.7: 7 seven | de: sieben | fr: sept | es: siete | it: sette | zh: 七
digit.8: 8 eight | de: acht | fr: huit | es: ocho | it: otto | zh: 八
digit.9: 9 nine | de: neun | fr: neuf | es: nueve | it: nove | zh: 九

garment.t-shirt: t-shirt tshirt tee top | de: t-shirt | fr: t-shirt | es: camiseta ~ shirt
garment.shirt: shirt blouse | de: hemd bluse | fr: chemise | es: camisa ~ t-shirt
garment.trousers: trousers trouser pants jeans slacks | de: hose | fr: pantalon | es: pantalón pantalones
garment.pullover: pullover sweater jumper sweatshirt jersey hoodie | de: pulli pullover | fr: pull | es: jersey
    suéter ~ coat
garment.dress: dress gown frock | de: kleid | fr: robe | es: vestido ~ skirt
garment.skirt: skirt | de: rock | fr: jupe | es: falda ~ dress
garment.coat: coat jacket parka anorak | de: mantel jacke | fr: manteau veste | es: abrigo chaqueta ~ pullover
garment.sandal: sandal sandals flip-flop | de: sandale | fr: sandale | es: sandalia ~ sneaker
garment.sneaker: sneaker sneakers trainer trainers shoe shoes | de: turnschuh schuh | fr: basket chaussure | es:
    zapatilla zapato ~ boot sandal
garment.boot: boot boots bootie | de: stiefel | fr: botte bottine | es: bota ~ sneaker
garment.hat: hat cap beanie | de: hut mütze | fr: chapeau | es: sombrero gorra
garment.bag: bag handbag purse backpack | de: tasche | fr: sac | es: bolso bolsa

picture.x-ray: x-ray xray radiograph radiography | de: röntgenbild röntgen | fr: radiographie | es: radiografía
picture.mri: mri mr | de: mrt | fr: irm | es: rm
picture.ct: ct cat-scan tomography | de: computertomographie | fr: tdm scanner | es: tac
body.head: head skull brain cranial | de: kopf schädel gehirn | fr: tête crâne cerveau | es: cabeza cerebro
body.chest: chest thorax thoracic lung lungs | de: brust brustkorb lunge | fr: thorax poumon | es: tórax pulmón
body.abdomen: abdomen abdominal belly | de: bauch abdomen | fr: abdomen ventre | es: abdomen
body.breast: breast mamma mammary mammogram mammography | de: mamma | fr: sein | es: mama
body.hand: hand wrist fingers | de: hand | fr: main | es: mano
"""


def _folded(word: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())


def _folded_words(text: str) -> frozenset[str]:
    return frozenset(map(_folded, text.split()))


# Small words: they name nothing to be seen, and they tell languages apart.
_SMALL_WORDS = {
    "en": "a an the of on in at with and or is are for to from by as this that these those it its my your his her"
    " our their i you he she we they me us them please do does be can could would should want like need some"
    " any there very really just so but now make makes made give show something"
    " anything everything all each every",
    "de": "ein eine einen einem einer eines der die das dem den des auf im in mit und oder von vom ist sind für zu"
    " zum zur aus bei ich du wir bitte mir mich es sehr aber jetzt nun mach mache male zeig zeige gib ganz"
    " etwas alles etwas"
    " alles vor hinter über unter am",
    "fr": "un une des le la les l du de d sur dans avec et ou est sont pour à au aux je tu nous vous moi s il elle"
    " très mais maintenant en fais dessine montre ce cette qui plaît",
    "es": "un una unos unas el la los las del de sobre en con y o es son para a al yo tú me por favor muy pero"
    " ahora haz dibuja muestra este esta que lo",
    "it": "un uno una il lo la i gli le di del della su sul sulla in con e o è sono per a al io mi per favore molto"
    " ma ora adesso fai disegna mostra questo questa che",
    "pt": "um uma uns umas o a os as do da de em no na sobre com e ou é são para ao à eu me por favor muito mas"
    " agora faz desenha mostra este esta que",
    "nl": "een de het van op in met en of is zijn voor te uit bij ik jij wij mij alstublieft graag zeer maar nu"
    " maak teken toon dit dat die",
    "ru": "и в на с из для это мне пожалуйста очень но теперь сделай нарисуй покажи",
    "ar": "على في من مع و هذا هذه الآن لكن ارسم",
    "he": "על עם של את זה עכשיו אבל בבקשה",
    "fa": "با در از یک را روی این و لطفا",
    "zh": "的 在 个 個 上 有 是 了 请 請 色 形 景 一",
    "ja": "の は が を に で と な き い い色 色 形 景",
}

# Of requests for pictures, in any language: they name the request, not what is to be seen.
REQUEST_WORDS = _folded_words(
    "picture pictures image images photo photos photograph drawing sketch painting draw paint generate create"
    " render depict illustrate design featuring containing showing shows colored coloured color colour shaped"
    " sized size shape sizes shapes colours colors bild foto zeichne erzeuge farbe form dessin photographie"
    " couleur forme imagen dibujo genera crea color forma immagine disegno colore imagem cor afbeelding kleur"
    " vorm картинка цвет"
)
POLITE_WORDS = _folded_words(
    "thanks thank hello hi ok okay yes yeah good great nice cool danke hallo ja gut merci bonjour oui gracias hola si"
    " grazie ciao obrigado bedankt спасибо"
)
ARTICLES = _folded_words(
    "a an the ein eine einen einem einer der die das dem den un une le la el los una uno il lo um uma o een"
    " het de"
)

# What a conversation is made of.
NEGATIONS = _folded_words(
    "not no without never except kein keine keinen nicht ohne pas sans ni sin non senza sem não niet geen не"
    " без"
)
AND_OR = _folded_words("and or nor und oder et ou y o ni e noch и или")
SAME = _folded_words(
    "same gleiche gleichen gleiches dasselbe derselbe dieselbe même mismo misma stesso stessa mesmo mesma"
    " zelfde такой"
)
CHANGE = _folded_words(
    "now instead again back still jetzt nun stattdessen wieder zurück maintenant plutôt encore ahora vez"
    " adesso ora agora nu теперь"
)
MAKE = _folded_words(
    "make turn change keep set mach mache ändere lass fais change rends haz cambia fai faz muda maak verander"
    " сделай"
)
IT = _folded_words("it them that this one es sie le la lo het это")
ANOTHER = _folded_words(
    "another other different else andere anderer anderes anderen weiterer autre otro otra altro altra outro"
    " outra andere другой другая"
)
MORE = _folded_words("more plus más mehr più mais meer")
LESS = _folded_words("less fewer weniger moins menos meno minder")
GREATER = _folded_words("larger bigger greater größer groesser mayor groter больше крупнее")
SMALLER = _folded_words("smaller littler tinier kleiner winziger menor меньше мельче")
ALSO_NO_COMPARISON = _folded_words("kleiner mayor menor")  # "ein kleiner Kreis": a comparison only at the end
SHADES = ("dark", "light")
TALK = SAME | CHANGE | MAKE | IT | ANOTHER | MORE | LESS | GREATER | SMALLER
LIKE_ON = _folded_words("on upon over against auf vor sur sobre contra su op على на 上")

# A script that one language alone writes in, nearly; the others need small words.
_OF_ONE_LANGUAGE = {
    "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "GREEK": "el", "HEBREW": "he", "THAI": "th", "ARMENIAN": "hy",
    "GEORGIAN": "ka", "TAMIL": "ta",
}  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """What several words mean alike.

    Attributes:
        kind: what it is a value of: "colour", "size", ...
        name: within its kind.
        step: place on the scale of its kind; `None` where the kind has no order.
        near: names of near meanings of the same kind, nearest first.
    """

    kind: str
    name: str
    step: int | None
    near: tuple[str, ...]


@dataclass(frozen=True)
class LanguageFound:
    """`code` is of ISO 639-1, or "und"; `why` is in words."""

    code: str
    why: str


@cache
def _words() -> dict[str, tuple[tuple[str, Meaning], ...]]:
    """Word to (language, meaning) of each place where the table has it."""
    found: dict[str, list[tuple[str, Meaning]]] = {}
    for line in filter(None, re.sub(r"\n +", " ", _TABLE).splitlines()):
        head, _, rest = line.partition(": ")
        kind, _, name = head.partition(".")
        step, _, plain_name = name.partition("-")
        on_scale = step.isdigit() and bool(plain_name)
        rest, _, near = rest.partition(" ~ ")
        meaning = Meaning(kind, plain_name if on_scale else name, int(step) if on_scale else None, tuple(near.split()))
        for place, part in enumerate(rest.split(" | ")):
            language, _, words = part.partition(": ") if place else ("en", "", part)
            for word in words.split():
                found.setdefault(_folded(word), []).append((language, meaning))
    return {word: tuple(entries) for word, entries in found.items()}


def meanings(word: str, language: str = UNDETERMINED) -> list[Meaning]:
    """What a folded word, or a form of it, may mean; entries of `language` and English come before others."""
    for form in forms(word):
        if entries := _words().get(form):
            # A word of the text's own language is preferred: French "rose" is a colour before it is anything else.
            ordered = sorted(entries, key=lambda entry: (entry[0] != language, entry[0] != "en"))
            return list(dict.fromkeys(meaning for _, meaning in ordered))
    return []


@cache
def scale(kind: str) -> tuple[Meaning, ...]:
    """Meanings of `kind` that have an order, upwards."""
    found = {meaning for entries in _words().values() for _, meaning in entries if meaning.kind == kind}
    return tuple(sorted((m for m in found if m.step is not None), key=lambda m: m.step or 0))


def languages_of(word: str) -> set[str]:
    """Languages in whose column of the table the word, or a form of it, stands."""
    found = next(({language for language, _ in _words()[form]} for form in forms(word) if form in _words()), set())
    # Only English makes "bluish" and "reddest": what is left of them may be a word of another language.
    return {"en"} if found and word not in _words() and word.endswith(("ish", "est")) else found


@lru_cache(2**16)
def is_small(word: str, language: str = UNDETERMINED) -> bool:
    """Whether `word` is a small word of `language` or English; of any language where that is not known."""
    if word in REQUEST_WORDS or word in POLITE_WORDS:
        return True
    codes = _small_words().keys() if language not in _small_words() else {language, "en"}
    return any(word in _small_words()[code] for code in codes)


@cache
def _small_words() -> dict[str, frozenset[str]]:
    return {language: _folded_words(words) for language, words in _SMALL_WORDS.items()}


def forms(word: str) -> Iterator[str]:
    """`word`, and what it may be a form of: plurals, comparatives, "reddish", German endings, Arabic's article."""
    yield word
    if word.startswith("ال") and len(word) > 4:
        yield word[2:]
    for ending, instead in (
        ("ies", "y"), ("es", ""), ("s", ""), ("ish", ""), ("iest", "y"), ("ier", "y"), ("est", ""), ("est", "e"),
        ("er", ""), ("er", "e"), ("en", ""), ("em", ""), ("e", ""), ("n", ""), ("y", ""), ("r", ""),
    ):  # fmt: skip
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3:
            yield stem + instead
            if len(stem) >= 4 and stem[-1] == stem[-2] and not instead:
                yield stem[:-1]  # bigger, reddish


def find_language(words: Sequence[str], text: str) -> LanguageFound:
    """
    Args:
        words: folded words of `text`, small words among them.
    """
    script = _script(text)
    if not script:
        return LanguageFound(UNDETERMINED, "no letters")
    if script in _OF_ONE_LANGUAGE:
        code = _OF_ONE_LANGUAGE[script]
        return LanguageFound(code, f"by its script, {script.lower()}")
    if script == "CJK":
        return LanguageFound("zh", "by its script: Chinese characters alone; could be Japanese")
    counts: dict[str, float] = {}
    evidence: dict[str, list[str]] = {}
    for word in dict.fromkeys(words):
        small = {code for code, listed in _small_words().items() if word in listed}
        named = languages_of(word)
        for code in small | named:
            # Words of the table are shared between languages more often, so they count less.
            counts[code] = counts.get(code, 0.0) + (1.0 if code in small else 0.6)
            evidence.setdefault(code, []).append(word)
    if not counts:
        return LanguageFound(UNDETERMINED, f"{script.lower()} letters, and no word that this list has")
    most = max(counts.values())
    best = [code for code, count in counts.items() if count == most]
    if len(best) > 1:
        return LanguageFound(UNDETERMINED, f"could be {', '.join(sorted(best))}")
    shown = ", ".join(evidence[best[0]][:4])
    return LanguageFound(best[0], f"by {counted_words(evidence[best[0]])} of it: {shown}")


def counted_words(words: Collection[str]) -> str:
    return "1 word" if len(words) == 1 else f"{len(words)} words"


def _script(text: str) -> str:
    """The script of most letters, as Unicode's names of characters begin; "" without letters."""
    counts: dict[str, int] = {}
    for character in text:
        if unicodedata.category(character)[0] == "L":
            script = unicodedata.name(character, "UNKNOWN ").split()[0].split("-")[0]
            counts[script] = counts.get(script, 0) + 1
    if counts.get("HIRAGANA", 0) + counts.get("KATAKANA", 0) and "CJK" in counts:
        return "HIRAGANA"  # Japanese mixes them; Chinese does not
    return max(counts, key=lambda script: counts[script]) if counts else ""
