"""Write the corpus on which the demo checkpoint is trained: stories and small conversations, from a grammar.

    python demo/corpus.py

Each line of the result is a JSON list of strings, a whole document: a plain story, a chat in ChatML, or a request or beginning and only the
first part of its story; the strings are in turn only read and learned. What can happen stands in tales/*.txt, what can be said in talk.txt, the
words in words.txt; this file puts them together, and holds the word lists by which it reads a beginning. See notation.txt for how those files are
written. `--show NAME` prints stories to read, of a premise, plot or situation; `--check` looks for slips.

A story is a plot told behind a beginning. Where a user asks for it, the beginning is mostly a premise's: its *cast* is drawn first, hero, friend,
thing, place, deed and so on; the story tells of some members, and the request names those that it could not guess: so a model that learns to predict
the story must look at the request. Or it is a situation's, asked for by what happens there. Where a user begins it, the beginning is a situation's or
a premise's, or one of openings.txt and beginnings.txt, and the plot tells of what it names.
"""

import argparse
import collections
import contextlib
import copy
import functools
import itertools
import json
import multiprocessing
import pathlib
import random
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent


# 1. Text with alternatives: "(a|b)", "{slot}", "<rule>", and what is in it

PIECES = re.compile(r"[()|]|\{[^{}]*\}|<[a-z][a-zA-Z0-9 _-]*>|[^()|{}<]+|[<{}]")


class Sequence(list):
    """Pieces one after the other: str, Slot, Rule, or Choice. Not to be changed once its `roots` have been asked for."""

    @functools.cached_property
    def roots(self):
        return {slot.split()[-1].split(".")[0] for slot in slots(self)}


class Choice(list):
    """Alternatives, each a Sequence, one of which is drawn."""


class Slot(str):
    """A value of the cast, by name: "hero", "a friend", "deed.past"."""


class Rule(str):
    """The name of a rule whose text is put here."""


def parse(text):
    """The Sequence that TEXT in our notation stands for. Raises ValueError for parentheses or braces that do not match."""
    stack = [Choice([Sequence()])]
    for piece in PIECES.findall(text):
        if piece == "(":
            stack.append(Choice([Sequence()]))
        elif piece == "|" and len(stack) > 1:
            stack[-1].append(Sequence())
        elif piece == ")" and len(stack) > 1:
            choice = stack.pop()
            stack[-1][-1].append(choice)
        elif piece in ("|", ")"):
            raise ValueError(f"{piece!r} outside of parentheses: {text[:80]!r}")
        elif piece in ("{", "}"):
            raise ValueError(f"{piece!r} without its other one: {text[:80]!r}")
        elif piece[0] == "{":
            stack[-1][-1].append(Slot(piece[1:-1]))
        elif piece[0] == "<" and len(piece) > 2:
            stack[-1][-1].append(Rule(piece[1:-1]))
        else:
            stack[-1][-1].append(piece)
    if len(stack) > 1:
        raise ValueError(f"a parenthesis is not closed: {text[:80]!r}")
    return stack[0][0]


def settled(grammar, text, rng):
    """A parsed TEXT with its alternatives and rules drawn: a Sequence of str and Slot."""
    out = Sequence()
    for piece in text:
        out += (settled(grammar, rng.choice(piece), rng) if isinstance(piece, Choice)
                else settled(grammar, rng.choice(grammar.rules[piece]), rng) if isinstance(piece, Rule) else [piece])
    return out


def literal(text):
    """A parsed text with the first of its alternatives, "x" for each slot."""
    return "".join(piece if type(piece) is str else literal(piece[0]) if isinstance(piece, Choice) else "x" for piece in text)


def literal_of_all(text):
    """A parsed text with all of its alternatives, one behind the other."""
    return " ".join(piece if type(piece) is str else " ".join(map(literal_of_all, piece)) if isinstance(piece, Choice) else "x" for piece in text)


def words_of(text):
    """All words of a parsed text, in small letters."""
    return set(re.findall("[a-z]+", literal_of_all(text).lower()))


def roots(phrase):
    """The slots a parsed text uses, without their forms: "a hero", "hero.kind" -> "hero"; a set of one's own."""
    return set((phrase if isinstance(phrase, Sequence) else Sequence(phrase)).roots)


def slots(sequence):
    """All slot names in a parsed text."""
    for piece in sequence:
        if isinstance(piece, Slot):
            yield str(piece)
        elif isinstance(piece, Choice):
            for alternative in piece:
                yield from slots(alternative)


class Grammar:
    """All rules, plots, situations, premises, beginnings (`openings`), talk and words. `rules[name]` is a list of Sequences, one of which is drawn;
    `questions[name]` one of (question, answer); `plots_for[trouble]` the plots that can be told behind a beginning with this trouble.
    SECOND: it is for the documents of the second training."""

    def __init__(self, folder=HERE, second=False):
        self.second = second
        self.words, self.talk = read_words(folder / "words.txt"), Talk()
        self.rules, self.questions = collections.defaultdict(list), collections.defaultdict(list)
        self.plots, self.situations, self.premises, self.openings = {}, {}, {}, []
        if not (paths := sorted((folder / "tales").glob("*.txt"))):
            raise ValueError(f"{folder / 'tales'}: no *.txt there")
        for path in paths:
            {"situations": read_situations, "premises": read_premises}.get(path.stem.split("-")[0], read_plots)(path, self)
        for plot in self.plots.values():
            if lacking := [key for key in Plot.KEYS if len(plot.lines[key]) < 2]:
                raise ValueError(f"plot {plot.name}: wanted two lines {lacking[0]!r}")
        self.plots_for = {trouble: [plot for plot in self.plots.values() if plot.trouble == trouble] for trouble in TROUBLES}
        if lacking := [trouble for trouble, plots in self.plots_for.items() if not plots]:
            raise ValueError(f"{folder / 'tales'}: no plot for {lacking[0]!r}")
        situations = self.situations.values()
        self.situations_of = {"any words": [each for each in situations if each.fits_any],
                              "a situation": [each for each in situations if not each.fits_any],
                              "one's own": [each for each in situations if each.told_by_one]}
        self.any_openings = [opening for opening in self.openings if opening.kind is None]
        read_talk(folder / "talk.txt", self)
        self.held_out = HeldOut(folder / "heldout.txt")
        self.held_out.remove_from(self.words)
        self.nouns = Nouns(self.words)
        # only now: a premise that draws from [deeds] has read all of it
        self.words["deeds"] = [deed for deed in self.words["deeds"] if deed not in self.words["deeds only taught"]]

    @functools.cached_property
    def wide_places(self):
        """Those of the (preposition, place) of the word list that are more than a seat, around which a story can go."""
        seats = SMALL | {*self.words["things"], *self.words["animals"], *SEATS}
        return [(preposition, place) for preposition, place in self.words["places"] if place not in seats]

    def a_premise(self, rng):
        """One of the premises, each as often as it says."""
        premises = list(self.premises.values())
        return rng.choices(premises, [premise.often for premise in premises])[0]

    def expand(self, sequence, cast, rng, bound=None):
        """Text of a Sequence: slots from CAST (a mapping), alternatives drawn by RNG. With BOUND, a dict, a rule that has
        been expanded keeps its text, so that a question and its answer speak of the same thing."""
        out = []
        for piece in sequence:
            if isinstance(piece, Choice):
                out.append(self.expand(rng.choice(piece), cast, rng, bound))
            elif isinstance(piece, Slot):
                out.append(cast[piece])
            elif isinstance(piece, Rule):
                out.append(self.expand_rule(piece, cast, rng, bound))
            else:
                out.append(piece)
        return "".join(out)

    def expand_rule(self, name, cast, rng, bound=None):
        """Text of the rule NAME. Raises KeyError when there is none."""
        if bound is not None and name in bound:
            return bound[name]
        if name not in self.rules:
            raise KeyError(f"no rule <{name}>")
        text = self.expand(rng.choice(self.rules[name]), cast, rng, bound)
        if bound is not None:
            bound[name] = text
        return text


# 2. Tidying: articles, capitals, spaces

SAID = (r"(said|asked|seemed|cried|called|shouted|whispered|laughed|answered|replied|yelled|sighed|sang|thought|wondered|added|begged|"
        r"grumbled|giggled|mumbled|squeaked|growled|gasped|agreed|explained|told|repeated|read|muttered|cheered|roared|croaked|"
        r"hummed|sobbed|admitted|announced|smiled|murmured|groaned|boomed|huffed|snapped|sniffed|chirped|exclaimed|"
        r"promised|warned|went|says|asks|puffed|panted|chuckled|hooted|bellowed|wailed|piped|barked|teased|suggested|joked|ordered)")
# A letter behind a question or a cry, unless it says who said that; and one that begins speech behind who says it.
AFTER_SPEECH = re.compile(r'([!?]" "?)(?!(?:[\w\'-]+ ){0,4}' + SAID + r'\b)([a-z])')
BEFORE_SPEECH = re.compile(r'(\b' + SAID + r'(?: [\w\'-]+){0,4}, ")([a-z])')
LIKE_YOU = r"(?=(?:uni[cfqtv]|use|usu|eu|one\b|one-|onesie|ukul))"         # a vowel that sounds like a consonant


def an(text):
    """TEXT with "an" where "a" stands before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU]|hour\b|honest|[Xx]-ray)(?!" + LIKE_YOU + ")", r"\1n ", text)


def tidy(text):
    """Repair what alternatives leave behind: "a apple" -> "an apple", capitals where sentences begin, double spaces."""
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" *\n *", "\n", text).strip()
    text = re.sub(r" ([.,!?;:])", r"\1", text)
    text = re.sub(r"\b[Aa]ll two\b", "both", text)
    text = an(text)
    capital = lambda match: match[1] + match[2].upper()
    text = re.sub(r'(^"?|\n"?)([a-z])', capital, text)
    text = re.sub(r'([.!?] "?)([a-z])', capital, text)                     # He ran. she ran.
    text = re.sub(r'(\." "?)([a-z])', capital, text)                       # "I ran." she ran.
    text = AFTER_SPEECH.sub(lambda m: m[1] + m[3].upper(), text)
    return BEFORE_SPEECH.sub(lambda m: m[0] if '," ' in before(m) else m[1] + m[3].upper(), text)


def before(match):
    """The part of the match's own sentence that stands before it."""
    return re.split(r"[.!?] |\n", match.string[:match.start()])[-1]


def sentences(text):
    """The sentences of TEXT as plain lower-case words, for the search for repetitions."""
    parts = re.split(r'[.!?]+"?\s+"?(?=[A-Z])|\n+', text)
    return [words for words in (re.sub(r"[^a-z0-9' ]", "", part.lower()).strip() for part in parts) if words]


def whole_sentences(text):
    """The sentences of TEXT as they are."""
    return re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+", text)


def repeats(text):
    """The first sentence of three or more words that occurs twice in TEXT, else None."""
    seen = set()
    for sentence in sentences(text):
        if len(sentence.split()) >= 3:
            if sentence in seen:
                return sentence
            seen.add(sentence)
    return None


def listed(names, comma=""):
    """ "a fox", "a fox and a lantern", "a fox, a lantern and a bridge"; with COMMA="," one before the last "and", too. """
    return ", ".join(names[:-1]) + comma * (len(names) > 2) + " and " + names[-1] if len(names) > 1 else names[0]


# 3. Words

THINGS = ("toys", "tools", "clothes", "instruments", "treasures", "foods to carry", "plants", "home things")

# Stems in "-ed" that lack an e: "decided", "noticed", "danced", but not "waited", "sailed".
LACKS_E = re.compile(r"([^e]id|(?<![oe])at|[cvn]it|i[vz]|iev|(?<![ao])il|o[vs]|a[vzg]|(?<![aeo])[aiu][srkp]|[aeo][iu]s|eas|[iau]c|nc|[hr]ang|nj|"
                     r"[dr]g|[rl]v|[bdtgpfkz]l|(?<!o)ast|(?<!e)ach|eath|ee[sz]|u)$")
# Verbs that are not conjugated by rule, and how they are said as of now.
NOW = {"was": "is", "were": "are", "had": "has", "did": "does", "would": "will", "could": "can", "couldn't": "can't", "wouldn't": "won't",
       "didn't": "doesn't", "wasn't": "isn't", "hadn't": "hasn't"}
# Behind these stands no verb of the past ("had lost", "the lost hat"); words that may stand between the two.
AUXILIARIES = set("was were is are be been being had has have got did does a an the his her my their its your so too very never really quite".split())
BETWEEN = set("never always already just still only not almost nearly quite really very so too all yet ever even hardly".split())

# Behind these a verb stands as it is: "wanted to put it down".
BARE = set("to could would should might must may can cannot will couldn't wouldn't didn't".split())

ONSETS = ("b br c ch cl cr d dr dv f fl fr g gl gr gw h j k kh kl kn kr l ll m mb mw n ng ny p ph pl pr qu r rh s sc sch sh sk sl sm sn sp st "
          "sv sw t th thr tr ts tw v vl w wh wr x y z zh zw").split()
VOWELS = "a a a e e e i i o o u y ai au ea ee ei eu ia ie oa oo ou ue".split()
CODAS = " b ck d f ft g k l ld ll lt m mp n nd ng nk nt p r rk rl rn rt s sh sk ss st t th x z".split(" ")

NOT_FOR_CHILDREN = re.compile("fuc|shit|cock|dic|cunt|rap|nazi|piss|bitch|slut|anus|peni|tit|fag|nig|sex|porn|crap|puss|bast|hore|damn")

NO_NEW_NOUN = {"been", "is", "was", "are", "were", "had", "has", "did", "does", "you", "we"}       # beside UNNOTICED and STARTS


def read_words(path):
    """The lists of words.txt: {section: [entry, ...]}; "irregular verbs" becomes {base: (past, ing)}."""
    words, section = collections.defaultdict(list), None
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            words[section] += [entry.strip() for entry in line.split(",") if entry.strip()]
    words["irregular verbs"] = {base: forms for base, *forms in (entry.split() for entry in words["irregular verbs"])}
    words["things"] = [entry for name in THINGS for entry in words[name]]
    words["places"] = [(kind.split()[0], entry) for kind in ("in places", "at places", "on places") for entry in words[kind]]
    return words


def conjugate(phrase, irregular):
    """(base, third person, past, -ing form) of a verb phrase: "ride a bike" -> rides, rode, riding a bike."""
    verb, _, rest = phrase.partition(" ")
    rest = " " + rest if rest else ""
    third = {"have": "has", "be": "is"}.get(verb) or verb + ("es" if re.search(r"(s|x|z|ch|sh|o)$", verb) else "s")
    past, ing = verb + "ed", verb + "ing"
    if re.search(r"[^aeiou]y$", verb):
        third, past = verb[:-1] + "ies", verb[:-1] + "ied"
    elif verb.endswith("e"):
        past, ing = verb + "d", verb[:-1] + "ing" if not verb.endswith("ee") else ing
    elif re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb):
        past, ing = verb + verb[-1] + "ed", verb + verb[-1] + "ing"
    if verb in irregular:
        past, ing = irregular[verb][:2]
    return phrase, third + rest, past + rest, ing + rest


def base_of(past, irregular):
    """The verb of which PAST is the past: "went" -> "go", "stopped" -> "stop"; None where it is no verb's."""
    for base, forms in irregular.items():
        if forms[0] == past:
            return base
    if past in ("were", "was") or not past.endswith("ed") or len(past) < 5:
        return None
    stem = past[:-2]
    doubled = len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lszfr"
    if stem.endswith("i"):
        return stem[:-1] + "y"
    return stem[:-1] if doubled else stem + "e" if LACKS_E.search(stem) or conjugate(stem, {})[2] != past else stem


def unconjugated(phrase, irregular):
    """(base, past) of a PHRASE in the third person: "loses his hat" -> ("lose his hat", "lost his hat"); None where its first word is no such verb, or
    a second verb may follow."""
    word, _, rest = phrase.partition(" ")
    if re.search(r"\b(?:and|but|or|then|who|that|because|when|until|so|as|while|if)\b|,", rest):
        return None
    base = ("have" if word == "has" else word[:-3] + "y" if re.search("[^aeiou]ies$", word) and len(word) > 4 else
            word[:-2] if re.search("(?:ss|x|zz|ch|sh|o)es$", word) else word[:-1])
    no_verbs = AUXILIARIES - {"has"} | BETWEEN | {"sometimes", "perhaps", "unties", "tiptoes", "aches"}
    if word in no_verbs or len(base) < 2 or not word.islower() or conjugate(base, irregular)[1] != word:
        return None
    return f"{base} {rest}".strip(), f"{conjugate(base, irregular)[2]} {rest}".strip()


def as_of_now(text, irregular):
    """TEXT, told in the past, as one speaks of what happens in a story: "Mia lost her hat and was sad" -> "Mia loses her hat and is sad". By the word
    lists alone, so that it errs now and then, as do people who ask."""
    parts, many, turned = re.split(r"([A-Za-z]+(?:'[a-z]+)?)", text), False, False          # turned: a verb since the last comma or full stop
    words = parts[1::2]
    for i, word in enumerate(words):
        many = many and not re.search("[.!?]", parts[2 * i])
        turned = turned and not re.search("[.,;:!?]", parts[2 * i])
        before = next((each for each in reversed(words[:i]) if each.lower() not in BETWEEN), "").lower()
        if before in ("he", "she", "it", "nobody", "somebody", "who", "everybody", "everyone", "someone"):
            many = False
        elif before in ("i", "you", "we", "they"):
            many = True
        elif not turned and i > 1 and words[i - 2] == "and" and (words[i - 1][0].isupper() or i > 2 and words[i - 3][0].isupper()):
            many = True                                         # "Tom and Mia", "Tom and the dog"
        named = word in ("named", "called") and words[i + 1:i + 2] and words[i + 1][0].isupper()
        state = word in ("left", "stuck", "lost") and ("," in parts[2 * i] or not parts[2 * i + 2].isspace())      # "one was left."
        if word in NOW:
            words[i], turned = {"had": "have", "did": "do"}.get(word, NOW[word]) if many else NOW[word], True
        elif word.islower() and before and before not in AUXILIARIES and before not in BARE and not (named or state) and (base := base_of(word, irregular)):
            words[i], turned = base if many else conjugate(base, irregular)[1], True
    parts[1::2] = words
    return "".join(parts).replace("can not", "cannot")


def plural(noun):
    """ "foxes", "ponies", "mice", "lighthouse keepers". """
    irregular = ("mouse mice goose geese moose moose man men sheep sheep fish fish deer deer wolf wolves calf calves elf elves leaf leaves "
                 "thief thieves child children")
    for one, many in zip(irregular.split()[::2], irregular.split()[1::2]):
        if noun.endswith(one):
            return noun[:-len(one)] + many
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def nonce(rng):
    """Letters that nobody has put together, so that the model learns to copy these, not only words that it knows: "plimo", "svarrik"."""
    return rng.choice(ONSETS) + "".join(rng.choice(VOWELS) + rng.choice(ONSETS) for _ in range(rng.choice([0, 1, 1, 2]))) + (
        rng.choice(VOWELS) + rng.choice(CODAS))


def made_up_name(rng):
    """A name that nobody has: "Plimo", "Svarrik"."""
    while True:
        name = nonce(rng)
        if not NOT_FOR_CHILDREN.search(name):
            return name.capitalize()


def made_up_noun(words, rng):
    """A noun that does not exist: "lantoose", "hedgephone", "plimo"; nor is it a word of any other sort, as "his" and "been"."""
    while True:
        noun = made_up_name(rng).lower() if rng.random() < 0.35 else spliced(words, rng, ("animals", "things"))
        if not any(noun in known for known in (UNNOTICED, STARTS, NO_NEW_NOUN)):
            return noun


def spliced(words, rng, kinds):
    """A word of the first letters of one and the last of another, both of the lists KINDS: "lantoose", "Svettina"."""
    while True:
        one, other = (rng.choice([word for word in words[rng.choice(kinds)] if word.isalpha()]) for _ in range(2))
        noun = re.match(r"(?i)[^aeiou]*[aeiou]+[^aeiou]*|.*", one)[0] + re.search(r"[aeiouy]+[^aeiouy]*[aeiouy]?[^aeiouy]*$", other)[0]
        if not NOT_FOR_CHILDREN.search(noun.lower()) and noun not in (one, other):
            return noun


def read_held_out(path, also=()):
    """The sections of heldout.txt: {name: [line, ...]}, lines split at bars into their fields; [turns] is a list of conversations, each a
    list of lines. Raises ValueError for a line without fields or a section that is not there: of those that the corpus needs, or ALSO."""
    sections, name = {}, None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("["):
            name = line.strip("[]")
            sections[name] = [[]] if name == "turns" else []
        elif line and not line.startswith("#") and (name is None or name not in ("words", "turns") and "|" not in line):
            raise ValueError(f"{path.name}:{number}: wanted a section in brackets, then lines of fields divided by |, found {line[:40]!r}")
        elif name == "turns":
            sections[name][-1:] = [sections[name][-1] + [line]] if line else [sections[name][-1], []]
        elif line and not line.startswith("#"):
            sections[name].append([field.strip() for field in re.split(r"\|+", line)])
    if missing := {"words", "requests", "more requests", "turns", *also} - sections.keys():
        raise ValueError(f"{path.name}: no section [{min(missing)}]")
    sections["turns"] = [turns for turns in sections["turns"] if turns]
    return sections


class HeldOut:
    """What the generator must not say, so that the test is one: words that it does not know at all, and requests of whose words
    no two may meet in one cast."""

    def __init__(self, path):
        sections, self.requests = read_held_out(path), collections.defaultdict(set)
        self.words = {word.lower() for fields in sections["words"] for word in re.split(r"[,\s]+", fields[0]) if word}
        for number, fields in enumerate(sections["requests"] + sections["more requests"]):
            for word in fields[-1].split():
                self.requests[word.split("/")[0].lower()].add(number)

    def remove_from(self, words):
        """Take the held-out words out of all lists of WORDS, in place."""
        keep = lambda entry: not self.words & set(str(entry).lower().replace("'", " ").replace(",", " ").strip("()").split())
        for name, entries in words.items():
            if isinstance(entries, list):
                words[name] = [entry for entry in entries if keep(entry if isinstance(entry, str) else entry[1])]

    def refuses(self, phrases):
        """Whether two words of one held-out request occur in PHRASES."""
        count = collections.Counter()
        for word in {word for phrase in phrases for word in phrase.lower().split()}:
            for number in self.requests.get(word, ()):
                count[number] += 1
        return any(n > 1 for n in count.values())


# 4. What a beginning speaks of

# What "a ..." introduces there, whatever it is, up to a word that cannot be part of it.
NEW_NOUN = re.compile(r"\b(?:[Aa]n?|[Tt]he|[Mm]y|[Yy]our|[Hh]is|[Hh]er|[A-Z][a-z]+'s) ((?:[a-z]+ ){0,2}?)([a-z]{3,})(?=[.,!?;]| (?:in|on|at|of|with|"
                      r"that|who|and|to|from|under|behind|for|by|near|was|were|had|inside|which)\b|'s\b)")

# Somebody who is called so: only a few of TITLED; more would change the shipped demo's documents.
CALLED = re.compile(r"\b(?:(?:Mrs\.|Mr\.|Captain|Uncle|Aunt) [A-Z]\w+|Mom|Dad|Mommy|Daddy|Grandma|Grandpa)\b")

# What somebody wishes for, "wanted to go swimming", up to where the wish ends; but not what is of somebody else, or just a way of speaking.
WISHES = r"(?:(?:wanted|wished|longed|hoped|decided|tried|planned|had always wanted) (?:so much )?to|could not|couldn't)"
PHRASE = r"((?:[a-z'-]+ ){0,6}?[a-z'-]+)(?=[.;!?]|,? (?:and|but|so|because|for|until|when|while|if) )"
NO_WISH = re.compile(r"\b(?:him|them|it|that|this|wait|believe|help|stop|tell|say|know|remember|forget|understand|be|even|any\w*)\b")

# What stands before a noun, perhaps with an adjective between.
ARTICLE = re.compile(r"(?i)\b(?:an?|the|his|her|my|your|our|their|some|no|of|two|three|four|five|[a-z]+'s) (?:[a-z]+ )?$")

# What stands before what somebody is, or would be: "to be a hero".
IS_ONE = re.compile(r"(?i)\b(?:be|become|became|being) an? (?:[a-z-]+ )?$")

# What a story has without being of it.
UNNOTICED = set("""afternoon again age ago alone anymore anything arm arms around asked autumn away back bad before began beginning
                best big bit bottom came case center century cold corner cough day days down ear ears edge end ends evening
                everything everywhere eyes face fall fast feet felt few first five foot found four friend friends fright front
                full good got great ground hair hand hands happy head heart her here high him his home hour hours hurry idea
                inside kind knew land lap last left leg legs let life liked line list little lived long longer look looked lot
                lots loud loved low made make many matter middle minute minutes moment months mood more morning most mouth much
                name names nap new next nice night nobody nose not nothing now number off old once one ones only other others
                out outside own pair part people person piece place play played pretty problem put quarter quiet ran reason rest
                right room sad said sake same sat saw second short show side sigh size slow small smile soft somebody someone
                something sort sorts sound sounds spring start starts state stood story then there thing things third thought
                three tight time times today together told tomorrow too took top tried tummy turn two very walk walked wanted
                warm way ways week weeks went while wish world year years yesterday young""".split())

# Nouns that are something else as often.
BOTH = set("""answer arch award back balance bank bare bargain bark bat battle beam bear beat block blow board book boot border bottle box brush bubble
               bug button cage calm camp can card chalk change charm chase cheer chip chorus circle claw close cloud coat code cold color comb cook cool
               copy cough count cover crack crawl crew cross crowd cry cup curl current curse cut dam dance dark date doctor dream dress drop drum duck
               dust escape exam face fall farm fast fear fight fine fire fish fit flash flat fly fun glow glue glues gold grow guard guide hail hand handle
               harvest hatch head heap heel help hide hollow home hook hope hose host howl hug hunt ice iron itch jail jam joke judge juice jump kick kind
               kiss knit knock knot label land lap last laugh laughs leaf leak lecture lie lift light like line list litter lock long loop lump mail march
               mark mask match mean mess milk mind mine mint mist mistake model mop nail name nap nest net note oil order pack packs page pail pain paint
               pan paper park patch pedal pet pin pine pit plain plan plant plate play plot pocket point poison polish pool port post pot powder power
               prank present press print promise pump quarrel question queue race rail report rescue rest reward rhyme ride ring roar rock rope round row
               ruin rule rumor rush safe sail sand saw scar score scores scratch seal seat second shade shake shape sharp shell shelter shine ship shiver
               shock shop short shout show shower shutter sign signal silver sink skate sled slide slope smell smile smoke snack sneeze snore sound spare
               spark spell spill splash spot spring sprout squash squeak stage stain stall stamp steam step stick still sting stitch stone store storm
               story stretch surf surface swallow swallows swap swing table tail tap task taste team tear test thread tie tin toast top touch trace track
               trade train trap treat tremble trick trip trouble tube tune turn twin view visit voice walk warning watch wave weed well whisper whistle
               will wind winner wish wonder work wound wreck wrinkle yard""".split())

# The words that have their capital only from the beginning of a sentence.
STARTS = set("""a above across after all along an another any around at behind below beside between both by down each every everybody
             everyone everything even few first for four from he her here his in inside it its many most near neither no nobody none not
             nothing of on once one only out outside over she since so some somebody someone something that the their them there they this
             three through two under until up very what with without""".split())


class Nouns:
    """Finds what a text speaks of. `forms` {form: singular} holds all nouns of the word lists, plurals too, as they stand in a text ("sea turtles");
    `never` what is none or not to be noticed ("rang"), `doubtful` nouns that are verbs, adjectives or numbers as well, so that only an article tells
    ("saw", "orange"); `people` are families, too, `beings` of fantasy and no objects."""

    def __init__(self, words):
        kinds = ("animals", "things", "vehicles", "he people", "she people", "creatures", "he family", "she family", "foods", "nature", "nouns",
                 "persons")
        known = {re.sub("^(the|a|an) ", "", word) for kind in kinds for word in words[kind]} | {place for _, place in words["places"]}
        self.forms = {form: noun for noun in sorted(known) if len(noun) > 2 and noun not in UNNOTICED for form in (noun, plural(noun))}
        self.adjectives = {word for kind in ("thing adjectives", "hero adjectives", "colors") for word in words[kind]}
        bare = lambda kinds: {re.sub("^(the|a|an) ", "", word) for kind in kinds for word in words[kind]}
        self.animals, self.places, self.events = set(words["animals"]), {place for _, place in words["places"]}, bare(["events"])
        self.people = bare(["he people", "she people", "persons", "he family", "she family"])
        self.behind_animals = {*self.places, *self.people, "market", "house", "clock", "bed", "ride"}      # "fish market"
        self.beings = bare(["creatures"]) - bare(["things", "vehicles", "nouns"]) - self.places
        self.never = UNNOTICED | {form for forms in words["irregular verbs"].values() for form in forms}
        verbs = {deed.split()[0] for deed in words["deeds"] + words["deeds with things"]} | set(words["irregular verbs"])
        self.doubtful = verbs | {form for verb in verbs for form in conjugate(verb, words["irregular verbs"])} | self.never | set(words["colors"]) | BOTH

    def singular(self, noun):
        """The singular of NOUN, if it is a plural that is known."""
        return self.forms.get(noun, noun)

    def noticed(self, text, members):
        """What TEXT speaks of, in its order, once each and with an article: ["the tiger", "his mom", "Grandpa", "the red kite"]; not what is
        one of the words MEMBERS."""
        phrases = {}
        for place, phrase in sorted(self.found(text).items()):
            noun = re.sub("^(his|her|the) ", "", phrase.lower())
            if not members & {*noun.split(), self.forms.get(noun)} and not IS_ONE.search(text[:place]):
                adjective = self.adjective(text[:place]) if phrase.startswith("the ") else ""
                phrases.setdefault(self.forms.get(noun, noun), f"the {adjective} {phrase[4:]}" if adjective else phrase)
        return list(phrases.values())

    def adjective(self, text):
        """The adjective with which TEXT ends, "" if it does not."""
        last = re.search(r"([a-z-]+) $", text)
        return last[1] if last and last[1] in self.adjectives else ""

    def parted(self, phrase):
        """(article, adjective, noun) of what noticed found: ("the", "red", "kite"), ("", "", "Grandpa")."""
        article, noun = phrase.split(" ", 1) if " " in phrase else ("", phrase)
        adjective, _, rest = noun.partition(" ")
        return (article, adjective, rest) if rest and adjective in self.adjectives and noun not in self.forms else (article, "", noun)

    def found(self, text):
        """{place in TEXT: phrase} of all nouns there."""
        found = {match.start(2): f"the {match[2]}" for match in NEW_NOUN.finditer(text)
                 if not re.search("(ed|est|ly)$", match[2]) and match[2] not in self.never and not self.forms.keys() & set(match[1].split())}
        found |= {match.start(): f"the {match[1].lower()}" for match in re.finditer(r"\b([Rr]ain|[Ss]now)(?:ing|ed)\b", text)}
        words, last = [match.span() for match in re.finditer("[A-Za-z]+(?:-[a-z]+)*", text)], -1
        for i, (start, _) in enumerate(words):
            end = self.end_of_noun(text, words[i:i + 4])
            if end is not None and text[end:end + 2] == "'s" and text[start].islower():
                last = end                                                      # an owner, "the farmer's son", is not spoken of
            elif end is not None and start > last:
                found = {at: phrase for at, phrase in found.items() if not start <= at < end}
                whose = re.search(r"(?i)\b(his|her|the|an?) (?:(?!an? |the )[a-z]+ )?$", text[:start])
                found[start] = f"{whose[1].lower() if whose and whose[1][0] in 'hH' else 'the'} {text[start:end].lower()}"
                last = end
        called = list(CALLED.finditer(text))                                    # "Mr. Finch" is no finch
        found = {at: phrase for at, phrase in found.items() if not any(match.start() <= at < match.end() for match in called)}
        return found | {match.start(): match[0] for match in called}

    def end_of_noun(self, text, words):
        """Where the noun ends that begins with the first of WORDS, [(start, end)] in TEXT, or None; two in a row are one: "school bell"."""
        before, part = text[:words[0][0]], lambda i, j: text[words[i][0]:words[j - 1][1]].lower()
        n = next((n for n in (3, 2, 1) if n <= len(words) and part(0, n) in self.forms), 0)
        if text[words[0][0]].isupper() and not re.search(r'(^|[.!?]"?\s+|")"?$', before):
            return None                                                         # a name: "his dog Salt"
        if not n or before[-1:] == "'" or part(0, n) in self.doubtful and not ARTICLE.search(before):
            return None
        if n < len(words) and part(n, n + 1) in self.forms and text[words[n - 1][1]:words[n][0]] == " ":
            n += self.forms[part(0, n)] == part(0, n) and (part(0, n) not in self.animals or part(n, n + 1) in self.behind_animals)
        if n == 1 and part(0, 1) in self.doubtful and len(words) > 1 and part(1, 2) in self.adjectives:
            return None                                                         # "the dark green ribbons"
        return words[n - 1][1]


# 5. The cast of a story

PRONOUNS = {"he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
            "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"}}

# The word lists of what is drawn for every cast.
LIST_OF = {"job": "jobs", "fear": "fears", "trait": "traits", "food": "foods", "color": "colors", "weather": "weathers", "home": "homes",
           "animal": "animals", "nature": "nature", "event": "events"}

# Whom a family calls by what he is: "Grandma".
CALLED_BY_ROLE = {"mom", "dad", "mama", "papa", "mommy", "daddy", "grandma", "grandpa", "granny", "nana"}

# Kinds that are of one sex.
SEX = dict.fromkeys("cow hen mare ewe doe nanny-goat".split() + ["queen bee"], "she") | \
    dict.fromkeys("rooster cockerel bull ox ram stallion drake tomcat peacock gander".split(), "he")


class Character:
    """Somebody in a story. `kind` "fox", `name` "Pip" or None, `gender` "he" or "she", of a hero read off a beginning also "I", "it" or "they";
    `adjective` with which it is introduced, or ""; `owner` the hero whose family it is, or None; `bond` what the hero calls
    this friend, when there is a name: "friend", "sister"."""

    def __init__(self, kind, name, gender, owner=None, adjective=""):
        self.kind, self.name, self.gender, self.owner, self.adjective, self.bond = kind, name, gender, owner, adjective, "friend"

    def __str__(self):
        if self.owner and not self.name:
            return self.kind.capitalize() if self.kind in CALLED_BY_ROLE else f"{self.owner.his} {self.kind}"
        return self.name or f"the {self.kind}"

    @property
    def his(self):
        return PRONOUNS[self.gender]["his"]

    @property
    def child(self):
        return self.kind in ("boy", "girl")

    def introduced(self, rng):
        """ "a fox named Pip", "a small girl called Mia", "an old owl", "his grandma". """
        if self.owner:
            return f"{self.owner.his} {self.kind} {self.name or ''}"
        kind = f"a {self.adjective} {self.kind}" if self.adjective else f"a {self.kind}"
        return f"{kind} {rng.choice(['named', 'named', 'called'])} {self.name}" if self.name else kind

    def as_friend(self, rng):
        """ "his friend Tilly", "his friend Tilly the rabbit", without a name "his friend the rabbit", of a family "his uncle"; needs the
        hero's pronoun. """
        if self.owner:
            return f"{self.kind} {self.name or ''}"
        if not self.name:
            return f"friend the {self.kind}"
        return f"{self.bond} {self.name}" + (f" the {self.kind}" if rng.random() < 0.5 and not self.child else "")

    def asked_for(self, rng, text):
        """How a user names somebody who is in the story TEXT: "a fox", "a fox named Pip", "Pip the fox", "Pip". Only by name when the
        story never says what kind it is."""
        if self.owner:
            return f"{self.owner.his} {self.kind} {self.name if self.name and rng.random() < 0.6 else ''}"
        if self.name and not re.search(rf"\b{re.escape(self.kind)}\b", text):
            return self.name
        forms = [f"a {self.kind}", f"a {self.kind}", f"a {self.kind}", f"a little {self.kind}" if " " not in self.kind else f"a {self.kind}"]
        if self.adjective and f"{self.adjective} {self.kind}" in text:
            forms += [f"a {self.adjective} {self.kind}"] * 2
        if self.name:
            forms += [f"a {self.kind} {rng.choice(['named', 'called'])} {self.name}", self.name if self.child else f"{self.name} the {self.kind}"]
        if self.name and self.child:
            forms += [self.name] * 3
        return rng.choice(forms)


class Cast(dict):
    """Slot -> text for one story. Members that are asked for by name: `characters` {role: Character}, and thing, place, deed ..."""

    def __init__(self, grammar, rng, characters=None, lists={}):
        """Draw a cast; CHARACTERS are its people, else they are drawn, too; LISTS {slot: [what it may be, ...]}."""
        super().__init__()
        self.grammar, self.rng, self.asking, self.asked, words = grammar, rng, None, {}, grammar.words
        pick = lambda slot, default: rng.choice(lists.get(slot) or words[default])
        self.characters = characters or draw_characters(words, rng)
        self.thing = pick("thing", "things")
        bare = " " in self.thing or self.thing in words["what is no thing"]
        self.adjective = rng.choice(words["thing adjectives"]) if rng.random() < 0.45 and not bare else ""
        self.place = rng.choice(words["places"])
        deed = rng.choice(words["deeds"])
        if rng.random() < 0.45:
            thing = rng.choice(words[rng.choice(["things"] * 5 + ["animals", "animals", "he people", "she people", "creatures"])])
            deed = an(f"{rng.choice(words['deeds with things'])} " + (plural(thing) if rng.random() < 0.2 and thing.isalpha() else f"a {thing}"))
            if rng.random() < 0.25:
                preposition, place = rng.choice(words["places"])
                deed += " " + (rng.choice(words["ways"]) if rng.random() < 0.5 else f"{preposition} the {place}")
        self.verbs = conjugate(deed, words["irregular verbs"])
        for slot, name in LIST_OF.items():
            self[slot] = pick(slot, name)
        rng.randrange(64)                                       # drawn for nothing: keeps the documents of the shipped demo
        self["number"] = rng.choice(["two", "three", "four", "five", "six", "seven", "eight", "nine"])
        self["adjective"] = rng.choice(words["hero adjectives"])
        self["made-up name"] = made_up_name(rng)
        self["user"] = rng.choice(words[rng.choice(["he names", "she names"])])
        self["name"] = rng.choice(words[rng.choice(["he names", "she names", "pet names"])])

    __eq__, __hash__ = object.__eq__, object.__hash__           # two casts are never the same, though their values may be

    def __missing__(self, slot):
        """Slots that are made of others: {a hero}, {friend.he}, {at place}, {deed.past}. Raises KeyError for no such slot."""
        first, _, second = slot.partition(" ") if " " in slot else slot.partition(".")
        if slot in PRONOUNS["he"]:
            return PRONOUNS[self.characters["hero"].gender][slot]
        if slot in self.characters:
            return str(self.characters[slot])
        if first in self.characters:
            character = self.characters[first]
            if second == "kinds":
                return plural(character.kind)
            return character.kind if second == "kind" else PRONOUNS[character.gender][second]
        if first == "a" and second in self.characters:
            character = self.characters[second]
            if self.asking:                                     # the same in a request and in the story's echo of it
                return self.asked.setdefault(second, self.asked_for(second))
            return character.introduced(self.rng)
        if first == "his" and second in self.characters:
            return PRONOUNS[self.characters["hero"].gender]["his"] + " " + self.characters[second].as_friend(self.rng)
        if first == "a" and second.split(".")[0] in (*self, *self.characters):
            return f"a {self[second]}"
        if slot in ("the nature", "the event"):                     # "a rainbow" that has been told of
            return re.sub("^an? ", "the ", self[second])
        if slot == "thing.adjective":
            return self.adjective
        if first == "thing":
            if not self.adjective or second == "noun" or self.asking and self.asked.setdefault("bare thing", self.rng.random() < 0.6):
                return self.thing
            return f"{self.adjective} {self.thing}"
        if slot in ("place", "the place", "at place", "to place"):
            preposition, place = self.place
            if first == "at" and self.asking:                   # users say it otherwise than the tale
                return self.asked.setdefault(slot, self.rng.choice([f"{preposition} the"] * 4 + [f"{preposition} a", "near the"]) + f" {place}")
            return {"place": place, "the": f"the {place}", "at": f"{preposition} the {place}", "to": f"to the {place}"}[first]
        if first == "deed" and second in ("", "s", "past", "ing"):
            return self.verbs[["", "s", "past", "ing"].index(second)]
        raise KeyError(f"no slot {{{slot}}}")

    def other(self, changed):
        """This cast, but for the members in the set CHANGED: another friend or thing."""
        cast, characters = copy.copy(self), {}
        taken = {word for each in self.characters.values() for word in (each.kind, each.name) if word}
        while not characters or taken & {characters["friend"].kind, characters["friend"].name}:
            characters = draw_characters(self.grammar.words, self.rng, hero=self.characters["hero"])
        another = Cast(self.grammar, self.rng, characters)
        if "friend" in changed:
            cast.characters = {**self.characters, "friend": characters["friend"]}
        if "thing" in changed:
            cast.thing, cast.adjective = another.thing, another.adjective
        return cast

    def pair(self):
        """Make the friend one of the hero's kind, so that one can ask for "two foxes", or "two sisters"; only when both have names."""
        hero, friend = self.characters["hero"], self.characters["friend"]
        if not may_be_two(hero, friend):
            return
        friend.kind, friend.gender, kinds = hero.kind, hero.gender if hero.child else friend.gender, plural(hero.kind)
        if hero.child:
            sibling = {"boy": "brother", "girl": "sister"}[hero.kind]
            kinds = self.rng.choice([kinds, "children", "friends", plural(sibling), plural(sibling), "little " + plural(sibling)])
            friend.bond = sibling if sibling in kinds else "friend"
        self["pair"] = f"two {kinds}"

    def invent(self, among=("hero", "friend", "thing", "thing", "thing", "place", "deed")):
        """Give one member AMONG these a noun that does not exist, so that the model learns to copy words that it has never seen; or the thing one
        of two words that never met: "a sparrow's bell"."""
        noun, which = made_up_noun(self.grammar.words, self.rng), self.rng.choice(among)
        if which == "thing":
            self.thing = noun if self.rng.random() < 0.4 else an(self.grammar.expand_rule("two nouns", self, self.rng))
            self.adjective = ""
        elif which == "place":
            self.place = (self.place[0], noun)
        elif which == "deed":
            self.verbs = conjugate(f"{noun} a {self.thing}" if self.rng.random() < 0.5 else noun, {})
        elif not self.characters[which].child:
            self.characters[which].kind = noun

    def names(self, slot):
        """The bare words for what SLOT stands for: ["fox", "Pip"], ["fox"] without a name, ["lantern"], ["garden"], ["swim"]."""
        if slot in self.characters:
            return list(filter(None, [self.characters[slot].kind, self.characters[slot].name]))
        if slot == "nature":
            return [re.sub("^an? ", "", self[slot])]
        return [{"thing": self.thing, "place": self.place[1], "deed": self.verbs[0]}.get(slot) or self[slot]]

    def asked_for(self, role):
        """How a user names the one who has ROLE: as Character.asked_for says, or "her dog"."""
        one, hero, animals = self.characters[role], self.characters["hero"], self.grammar.words["animals"]
        if role == "friend" and hero.child and one.kind in animals and self.rng.random() < 0.25:
            return f"{hero.his} {one.kind} {one.name if one.name and self.rng.random() < 0.4 else ''}"
        return one.asked_for(self.rng, self.asking)

    def said(self, slots):
        """The words by which a user would ask for SLOTS, for the comparison with what is held out."""
        return [name for slot in slots for name in self.names(slot)]


def draw_characters(words, rng, lists={}, hero=None):
    """{role: Character} of one story, of HERO or a new one: no two with one name, nor, where one has no name, of one kind. LISTS {role: kinds}
    may limit their kinds. Raises ValueError where none fits: a hero who is a snowman without a name has no friend among snowmen."""
    characters, tries = {"hero": hero} if hero else {}, 0
    for role, draw in ("hero", draw_hero), ("friend", draw_friend), ("other", draw_other), ("helper", draw_helper):
        while role not in characters:
            tries += 1
            if tries > 1000:
                raise ValueError(f"no {role} of {lists.get(role, 'any kind')} for {characters['hero']}")
            one = draw(words, rng, characters)
            if role in lists:
                one = Character(rng.choice(lists[role]), one.name, one.gender)
                if SEX.get(one.kind, one.gender) != one.gender:
                    continue
            if all((one.name is None or one.name != each.name) and one.kind != each.kind or
                   (one.name and each.name and one.name[:2] != each.name[:2]) for each in characters.values()):
                characters[role] = one
    return characters


def may_be_two(hero, friend):
    """Whether FRIEND can become one of HERO's kind, so that they are "two foxes": both have names, and one sex where the kind has."""
    return hero.name and friend.name and not friend.owner and (hero.kind not in SEX or hero.gender == friend.gender)


def draw_being(words, rng, shares, nameless):
    """A Character by SHARES: weights of child, grown-up or role, animal, creature; without a name in NAMELESS of the last three."""
    gender = rng.choice(["he", "she"])
    sort = rng.choices(["child", "people", "animals", "creatures"], shares)[0]
    adjective = rng.choice(words["hero adjectives"]) if rng.random() < 0.5 else ""
    if sort == "child":
        return Character({"he": "boy", "she": "girl"}[gender], draw_name(words, rng, gender, 0.05), gender, adjective=adjective)
    kind = rng.choice(kinds := words[f"{gender} people" if sort == "people" else sort])
    while kind in words["things"] and rng.random() < 0.6:           # a mug may be the hero, but who asks for a mug and a fox means the fox
        kind = rng.choice(kinds)
    gender = SEX.get(kind, gender)
    name = None if rng.random() < nameless else draw_name(words, rng, gender, 0.0 if sort == "people" else 0.5)
    return Character(kind, name, gender, adjective=adjective if " " not in kind else "")


def draw_name(words, rng, gender, pet):
    """A given name, with probability PET one of a pet; one in five is made up, and noted for `with_common_names`."""
    if rng.random() < 0.2:
        name = made_up_name(rng) if rng.random() < 0.4 else spliced(words, rng, ("he names", "she names"))
        words["made-up names"].append((name, gender))
        return name
    return rng.choice(words["pet names"] if rng.random() < pet else words[f"{gender} names"])


def draw_hero(words, rng, characters):
    return draw_being(words, rng, (0.36, 0.1, 0.38, 0.16), 0.15)


def entitle(words, rng, hero):
    """Give HERO now and then a title, "Captain Flora". Only in beginnings, which users write: "Captain" is likelier than any one
    of a thousand names, and a model that draws at a low temperature would else call all heroes so."""
    if hero.name and not hero.kind.endswith(("boy", "girl")) and rng.random() < 0.12:
        hero.name = f"{rng.choice(words[f'{hero.gender} titles'])} {hero.name}"


def draw_family(words, rng, hero, kin="family", named=0.0):
    """One of HERO's family, from the lists of KIN: "family" (older ones, too), "siblings" or "young family"; with a share NAMED by name."""
    gender = rng.choice(["he", "she"])
    name = draw_name(words, rng, gender, 0.0) if rng.random() < named else None
    return Character(rng.choice(words[f"{gender} {kin}"]), name, gender, owner=hero)


def draw_friend(words, rng, characters):
    child = characters["hero"].child
    if rng.random() < (0.15 if child else 0.06):
        if rng.random() < 0.5:
            return draw_family(words, rng, characters["hero"])
        return draw_family(words, rng, characters["hero"], "siblings" if child or rng.random() < 0.4 else "young family", 0.6)
    return draw_being(words, rng, (0.45, 0.08, 0.32, 0.15) if child else (0.1, 0.08, 0.64, 0.18), 0.3)


def draw_other(words, rng, characters):
    return draw_being(words, rng, (0.25, 0.15, 0.45, 0.15), 0.5)


def draw_helper(words, rng, characters):
    if rng.random() < 0.5:
        return draw_family(words, rng, characters["hero"])
    return Character(rng.choice(words["helpers"]), None, rng.choice(["he", "she"]))


# 6. Plots, and what they go on from

# What may have a line in a plot; what plots are for, see notation.txt; those of them without a {goal}.
SORTS = ("person", "animal", "many", "place", "nature", "thing")
TROUBLES = ("gone", "away", "wrong", "stuck", "sad", "low", "afraid", "wish", "want", "quarrel", "sorry", "riddle", "odd", "weather", "guest", "plain",
            "fix")
GOALLESS = ("low", "sorry", "plain", "fix")
ALONE = {"sad": "low", "odd": "plain", "afraid": "low"}         # what they are for the hero himself, where it is about nobody else; all others: "fix"

# What a plot's start says of a wish, where the beginning may have said it.
WANTED = re.compile(r"\bx (?:only |just |still )?(?:wanted|wished)\b|rather do than")

# Behind speech in a line of a plot, before a letter that tidy() leaves small: "Boo!" to nobody.
KEPT = "\N{WORD JOINER}"

# What no scene, "Nobody was looking when", stands before.
STATE = re.compile(" ?(lived|liked|loved|had|was|were|could|wanted|worked|knew|always|never)\\b")

# Of the word list's nature what counts as nature; the rest are things.
GREAT = set("""sun moon sky sea ocean rain snow wind fog mist night storm thunder cloud clouds rainbow stars""".split())

# Places that the word list lacks.
MORE_PLACES = ("bay", "cove", "gorge", "deck")

# Nouns, and words taken for some, that get no line of a plot.
UNTOLD = set("""he she it they different voice voices heads faces backs inch inches might squawk soccer football tag word words color colors winter summer
                noise noises hiccups birthday trip class adventure vacation holiday holidays lunch mistake smell lesson lessons care speech midnight
                feelings measles landing wash laugh shout leak test visit dark heat game song music poem joke secret dream dance tail tooth teeth eye belly
                neck paw paws wing wings beak fur skin knee knees finger fingers toe toes cheek cheeks spring line nose leg legs arm arms elbow thumb tongue
                mane claw hump beard heart breath day days month weekend noon hard crazy code job air could how what like far all along wide wild shame
                truth trouble crack squeak roar howl croak growl whimper buzz sleep fight tune trick break eat drive hop pop row set lot grade marriage
                south nature quarrel knock cry bite sneeze work spot top sides prickles itch itches fever plan answer answers question questions tale
                language step hug somersault cartwheel fit world goal wrinkles promise rule rules favorite measure climb jump jog arrival pass pick finish
                pocket breakfast supper dinner bath match price tide chapter chapters north east west sunrise sunset dawn dusk swim pinch pound spoonful
                blame mind fault honor glasses trousers pants pajamas scissors order view shade silence half direction parts lump accent accident address
                already anywhere bang because behind besides bleating blink blow bluer chance change cheer cheering clang click closer conscience crash
                creak dare darkness darling date daytime deal distance earthquake election everybody evenings exception eyelids faster favor fellow fist
                flap flight footsteps forehead forward fortune freckles glance goes groaning habit hairs headache heating hic hiccup himself hiss history
                homework howling hum hunger jerk journey knocking later laughter law length lie lies lines lip lips moo move muddle mumps mystery nearer
                news nibbles nickname numbers opinion past pause pity pounding prices push reflection rip role sadder say scratching shape shift shiver
                shock shoulder sing sit snap snoring solo sorrow spell splash stomach stomachache stops stop ten six seven nine hundred thousand million
                fourth seventh ninth twelfth open cross deep still each both itself themselves tonight yet older lower behind with come family team kingdom
                country county over gone sudden dizzy hear either herself yours has ready able better final smoky bigger higher want silent ache hooves hips
                bend sixth fifth billion hobby patience launch nights fill shake dent circles cities begin missing wrong angry late sick gust ride call body
                wrist chin snout knuckle eyebrow pounds rounds rooms couple mark bump weather peep yawn strength stroke stuff surprise talk taste tear
                throat ticking tip toothache tour travels trickle twice use waltz width will wink wonder worst zero pockets sleeve sleeves foot feet hand
                hands ear ears lap rooms houses floors floor stairs wave waves puddle bubble sand grass hay mud light track tracks trail footprint
                footprints haircut upstairs nerve height heights fun luck life love peace rest turn way""".split())

# Places that are too small to walk around in.
SMALL = set("windowsill haystack stone molehill flowerpot nest bench truck taxi car wagon bus cart basket box trunk chair bed sofa table shelf".split())

# Who may come by anywhere.
VISITORS = "mouse beetle snail sparrow frog hedgehog rabbit squirrel cat hen duck toad mole ladybug goat".split()

# What one takes or has, and nothing else instead.
TAKEN = set("""half pair bit piece part end side top bottom kind middle rest corner bath nap walk look break turn rest trip swim race party visit picnic
               breakfast supper dinner lunch school church bed bedtime town wall door window roof floor chimney ceiling wedding ball concert fair festival
               birthday parade contest""".split())

# What is said only of some animals and places, for which no others can stand.
NO_OTHER = {"animal": re.compile(r"(?i)\b(?:eggs?|nests?|wings?|fl(?:y|ies|ew|ying)|feathers?|tails?|bark\w*|milk|wool|shell|sw[aiu]m\w*|sang|hatch\w*|hive|"
                                 r"roar\w*|howl\w*|neigh\w*|"
                                r"clip-clop|shoes|hooves|horns?|beak|mane|flown|bowl|cage|perch\w*|branch\w*|lived? up|purr\w*|buzz\w*|prickles|horseshoe|"
                                r"tamer|small enough|bottom of the sea|"
                                r"meow\w*|kitty|moo(?:ed)?|baa\w*|quack\w*|cluck\w*|crow(?:ed|s|ing)|peck\w*|pouch|counted|counting)\b"),
            "thing": re.compile(r"(?i)\b(?:ring(?:s|ing)?|rang|takeoff|launch\w*|sail\w*|driv\w+|drove|rode|rid(?:e|es|ing)|pour\w*|strings?|buttons?|pages?|"
                                r"wheels?|fell off|s[aiou]ng\w*|mill|grind\w*|conduct\w*|put (?:it |them )?on|wear\w*|wore|eat\w*|ate|drink\w*|drank|cost|paid|"
                                r"coins?|pennies|sew\w*|knit\w*|read(?:s|ing)?|stitch\w*|"
                                r"struck|tick(?:s|ed|ing)?|chim(?:e|es|ed|ing)|bak(?:e|es|ed|ing)|burn\w*|lit|melt\w*|gr[eo]w\w*|bloom\w*|full of|empty|opened|"
                                r"locked|shone|glow\w*|plant\w*|frozen?|steam\w*|extra|one too many|one more|lay across|stuck (?:in|under)|climb\w*|c[ao]me in|"
                                r"go in|went (?:out|up)|dark|branch|top of|broken|noise|(?:third|fourth|fifth|sixth|seventh|ninth|tenth|twelfth|"
                                r"thirteenth) (?:one|stroke)|hung|hang\w*|spill\w*|mirror|tie[sd]?|tying|flip\w*|rust\w*|roll(?:s|ed|ing)?|leak\w*|squeak\w*|"
                                r"paddle|lid|flames?|flat|tune|sat on|lay on|flew (?:on|over)|pieces|practic\w*|hole|spoiled|ripe\w*|peel\w*|cook\w*|"
                                r"key|door|says?|written|letters?|words?)\b"),
            "place": re.compile(r"(?i)\b(?:sw[aiu]m\w*|water|waves?|splash\w*|wet|div(?:e|ed|ing)|boats?|books?|lessons?|trees?|"
                               r"day of|ready for|invited|got (?:on|off)|climbed down|bubbles|turn(?:ed|ing)|stop|r[au]n down|flow\w*)\b")}
NO_OTHER["many"] = NO_OTHER["thing"]                          # of many animals what is said of one

# Where one can be, but not around which a story can go.
SEATS = "chair sofa table shelf bookshelf floor carpet leaf branch mushroom motorcycle tractor horse elephant swing slide mast fence rocket".split()

# What makes an animal or a place of these a thing.
NOT_ALIVE = re.compile(r"\b(?:toy|stuffed|rubber|wooden|rocking|piggy|paper|chalk|sugar|teddy|ghost|sand|tin|glass|clay|chocolate|plush|cardboard|doll) ")

# Places that are none to be at instead of another.
PARTS_OF_A_HOUSE = "elevator windowsill closet refrigerator campfire oven sink escalator stairs staircase hallway balcony".split()

# Before a noun of which there are some; a way, or a part, of a place; and what somebody or something is in.
NUMBERED = re.compile(r"(?i)\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|many|some|few|several|all) ([a-z]+)")
WAYS = re.compile(r"(?i)\b(?:through|across|over|along|down|up|out of|off|past|onto|mov(?:ed|ing) into|cross|cut off|(?:edge|end|top|bottom|side|middle) of) "
                  r"(?:the|an?|his|her|my|our) ([a-z]+(?: [a-z]+)?)")
INSIDE = re.compile(r"(?i)\b(?:in|into|inside|through|out of|from|at|under|over) (?:the|an?|his|her|my) ([a-z]+(?: [a-z]+)?)")

# Whom the word list has among neither its people nor its kin.
PEOPLE = set("""stranger wife husband visitor partner passenger keeper owner seller director schoolteacher ranger ambassador dressmaker inspector midwife
                porter smith guide apprentice scout stationmaster forester trader duke countess duchess watchmaker collector grandchild weaver plumber clerk
                boss postmistress postmaster bandleader milkmaid choirmaster photographer actress tamer maker painter sweeper builder band orchestra crowd
                family baby sister brother mommy granny nephew customer guest pupil hermit player prisoner tutor team choir fairy elf gnome dwarf goblin
                kobold giant troll ogre pixie imp genie leprechaun ghost angel vampire mummy nymph sprite spirit robot android alien snowman scarecrow
                mermaid witch wizard""".split())

# The words of a beginning's last sentence by which nothing has happened yet, and those of any by which something is wrong, or not yet so.
AT_PEACE = re.compile(r"\b(loved|loves|liked|likes|lived|lives|named|called|always|every|together|best|enjoyed)\b")
WORRY = re.compile(r"(?i)\b(but|not|[a-z]+n't|never|no|nobody|nothing|nowhere|cry|cried|crying|sad|afraid|scared|lost|wish(ed|es)?|want(ed|s)?|could|stuck|"
                   r"broken?|torn|trouble|problem|hurt|sick|hungry|lonely|alone|too|gone|missing|worr(y|ied)|fell|angry|dark|tired|confused|puzzled|upset|"
                   r"nervous|grumpy|mad|cross|bored|cold|jealous|ashamed|strange|odd|suddenly|forgot)\b")

# The words by which a beginning says of a noun, NOUN, perhaps with an article and an adjective before it, what trouble there is with it.
NOUN = "Qq"
WAS = r"(?:was|were|is|are|had|has|felt|looked|got) (?:suddenly |now |still |all |already |very |so |too |always )*"
ITS = r"(?: (?:an?|the|his|her|my|our|their|some|one|[A-Z]\w*'s))?(?: [a-z-]+)?"
IS = {trouble: re.compile(re.sub(r"\s*\n\s*", "", words.strip())) for trouble, words in {
    "gone": rf"""
        \b(?:lost|los(?:es|ing)|(?:look|search)(?:ed|ing) for|missed|missing|not find|never found){ITS} {NOUN}\b|
        \b{NOUN} (?:{WAS}(?:gone|missing|lost|nowhere|disappeared|vanished|run away|flown away|not (?:yet )?(?:there|come))|
        did not come|disappeared|vanished|ran away|flew away|rolled away)\b""",
    "want": rf"""
        \b(?:wish(?:ed|ing) for|needed|dreamed of|longed for|(?:had|has) no|(?:wanted|wants|want)(?= (?:an?|the|his|her|some)\b)){ITS} {NOUN}\b""",
    "stuck": rf"""
        \b{NOUN} {WAS}(?:stuck|caught(?! an?\b| the\b)|trapped|locked in|shut in)\b""",
    "wrong": rf"""
        \b{NOUN} (?:{WAS}(?:broken|torn|locked|cracked|dirty|empty|wet|bent|ruined|spoiled|frozen|flat|crooked|rotten|burned|soaked|tangled|dark|
        silent|stained|worn out|out of order|small|big|short|long|heavy|loose)|
        broke|tore|cracked|leaked|burst|stopped|popped|would not|did not|could not|came loose|(?:tipped|fell|went|gone|blew) (?:over|down|apart|off|out))\b""",
    "sad": rf"""
        \b{NOUN} (?:{WAS}(?:sad|afraid|scared|frightened|sick|ill|lonely|alone|angry|cross|shy|tired|worried|upset|bored|hungry|cold|hurt|homesick|nervous|
        ashamed|jealous|unhappy|crying|weeping|sulking|lost)|cried|wept|sobbed|sulked|trembled|shivered|
        (?:would|could) not(?! believe| stop| wait| say| see| find| help| remember)|had a (?:cold|toothache|sore throat))\b""",
    "afraid": rf"""
        \b(?:afraid|scared|frightened) of{ITS} {NOUN}\b""",
}.items()}

# What a request has to say of three more sorts of trouble.
ASKED_WITH = {"quarrel": re.compile(r"\b(?:both|each|neither|quarrel|fight|fought|only one|share|agree|angry|pull|take|will not|argu|first)"),
              "odd": re.compile(r"\b(?:glow|s[aiu]ng|talk|sp(?:eak|oke)|says?\b|hum|mov|fl(?:y|ies|ew)|walk|strange|odd|magic|turn|gr[eo]w|shr|shin|danc|alive|"
                                r"laugh|"
                                r"cough|sneez|blink|disappear|change|follow|never seen|nobody)"),
              "riddle": re.compile(r"\b(?:who|what|why|where|how|knows?|secret|strange|riddle|mystery|wonders?|ever)\b")}

# The first words of wishes for something that is not there before they are fulfilled.
YET_TO_COME = tuple(f"{verb} " for verb in "join make build bake cook paint draw knit sew write invent carve grow weave get find buy have be become win see "
                                           "meet visit bring carry take deliver ride open".split())

# The words by which a beginning says that NOUN is not there, or not any more.
ABSENT = re.compile(rf"(?i)\b(?:hungry for|waiting for|in want of) (?:an? |some )?{NOUN}\b|\b(?:no|without|ate|eaten|swallowed|sold|spilled|forgot|forgotten|"
                    rf"lost)(?: (?:an?|the|one|only an?|any|my|your|his|her|[A-Z]\w*'s))?"
                    rf"(?: last)? {NOUN}\b|\b(?:for|with) (?:his|her|my) last {NOUN}\b|"
                    rf"{NOUN} (?:had |has |was )?(?:flown|flew|sailed|gone|went|moved|run|ran|driven|drove) (?:away|off|out|home)\b|"
                    rf"\bran out of (?:the )?{NOUN}\b|{NOUN} (?:was|were|had been) (?:all )?(?:eaten|sold)\b|{NOUN} (?:was|is) (?:on [A-Z]\w+day|tomorrow)\b|"
                    rf"{NOUN} (?:had |has )?(?:disappeared|vanished)\b|{NOUN} (?:was|were) (?:gone|missing)\b|{NOUN} (?:was|were) (?:still )?(?:a long way|"
                    rf"far) (?:off|away)\b|{NOUN} (?:was|were) to (?:start|begin|be|come)\b|there (?:was|would be) an? {NOUN} [a-z ]{{0,8}}on [A-Z]\w+day|"
                    rf"{NOUN},? (?:and )?went (?:away|off|out|home)\b|"
                    rf"\blooking for (?:an?|the|his|her|my) {NOUN}\b|{NOUN} [^.]*\band was gone\b")

# How a beginning names NOUN, with an article and an adjective; and what stands before it where it is only spoken of, not there: "like a NOUN".
ADJECTIVE = (r"(?:(?!(?:as|like|from|to|for|at|am|i'm|than|until|during|before|about|each|every|single|no|any|another|since|play(?:ed|ing)?|hear|heard|smell|"
             r"smelled|"
             r"an?|the|his|her|my|our|their|your|and|or|but|in|on|of|by|with|under|behind|near|into|over|named|called|had|has|who|that) )[a-z-]+ )")
SAID_OF = re.compile(rf"\b(?:(?:an?|the|his|her|my|our|their|your) {ADJECTIVE}{{0,2}}|{ADJECTIVE}?){NOUN}\b")
NOT_THERE = re.compile(r"\b(?:like|(?!and|but|not)[a-z]{3,} as|(?:back|home|away|was|were|far|went|ran) from|(?:get|got|go|way|back|how) to|"
                       r"i am|i'm|you are|(?:want|wants|wanted|gone|went|go) to (?:see|look at)|(?:made|built)(?: out)? of|by order of|"
                       r"as [a-z]+ as(?: [a-z]+){0,3}|than|until|during|"
                       r"(?:day|week|night|evening|hour|minutes?|just|long|soon) before|(?:told|tell|talk(?:ed)?|story|book|song|something|nothing|all|know|"
                       r"knew|asked|dreamed|read|thought) about|each|every(?: single)?|no|any|another|not|neither|since|(?:left|set out) for|moved to|(?:has|"
                       r"had|never|not) (?:ever |yet )?seen|"
                       r"(?:thought|said|as if|pretended)(?: that)? (?:it|he|she|they) (?:was|were)|(?:visitor|man|woman|lady|boy|girl|friend|cousin|twins|"
                       r"news) from|"
                       r"(?:photo|picture|drawing|portrait|painting|statue|map|sound|smell|noise|name|word|taste)s? of|used to|"
                       r"(?:miss(?:ed|es)?|longed for|homesick for|told of)|(?:not|n't)(?: even)? (?:see|find)|never heard|(?:came|comes?|coming|moved|arrived|"
                       r"flown)\b[^.,!?]* from|there would be(?: music and)?|(?:run|ran|gone) (?:away|off) to|going to|believed? in|(?:thought|think|thinking|"
                       r"dreamed|dreaming) of|belong(?:ed|s)? to|(?:late|practic\w+|train\w*|ready|waited|waiting) for|"
                       r"play(?:ing|ed)?(?: at)?|(?:back|home|in time) for|(?:hear|heard|smell|smelled)|"
                       r"(?:take|took|bring|brought|carry|carried|send|sent)\b[^.]* to) $")

# The words by which a beginning says whose kin somebody is, and where something is.
KIN = re.compile(r"\b(?:his|her|their|[A-Z]\w*'s) (?:[a-z]+ )?"
                 r"(?:mom|mommy|mother|mama|dad|daddy|father|papa|cousin|twin|(?:grand)?(?:ma|pa)|brother|sister|wife|husband|son|daughter)\b")
WHERE = "(in|at|on|under|by|near|behind)"

ROLES = ("hero", "friend", "other")

# Titles, with the sex of whom they are.
TITLED = {**dict.fromkeys("Mr. Uncle Grandpa King Prince Sir Brother".split(), "he"),
          **dict.fromkeys("Mrs. Ms. Miss Aunt Auntie Grandma Granny Queen Princess Lady Sister".split(), "she"),
          **dict.fromkeys("Captain Old Little Doctor Dr. Professor".split())}

# Those of them that situations give to grown-ups, or the very small.
TITLES = {"he": ["Mr.", "Mr.", "Uncle", "Grandpa", "Old", "Little", "Captain"],
          "she": ["Mrs.", "Miss", "Aunt", "Grandma", "Granny", "Old", "Little"]}

# Who and what a premise may have besides its hero; what any premise may have in addition, with no part in what happens, and how often each is.
MEMBERS = ("friend", "place", "thing", "nature", "event")
BACKGROUND = {"friend": 26, "thing": 26, "place": 24, "second thing": 8, "second friend": 4, "nature": 3, "event": 2, "food": 3, "trait": 3, "weather": 2}
IN_ORDER = ["trait", "place", "thing", "food", "weather", "nature", "event", "friend"]       # the friend last: "he" is the hero until then


def head(phrase):
    """PHRASE up to the noun that it is of: "the door" of "the door in the sky"."""
    return re.split(" (?:in|on|under|behind|of|from|full of|with) ", phrase)[0]


def is_said(text, noun, pattern):
    """Whether TEXT says of the word NOUN what PATTERN, ABSENT or one of IS, stands for."""
    return noun in text and pattern.search(text.replace(noun, NOUN)) is not None


class Plot:
    """What is told behind beginnings in which there is one sort of `trouble`, put together of `lines` {key: [parsed text, ...]}: a "start", a line
    "first SORT" for all that the beginning names and a "turn"; some lines "then SORT" and the "end". {it} is what a line is of, {goal} what the
    trouble is about: what is lost, who is sad. `verbs` those of the wishes that it is for, [] if for all others but those of `not_verbs`."""

    KEYS = ("start", "turn", "end", *(f"{half} {sort}" for half in ("first", "then") for sort in SORTS))

    def __init__(self, name):
        self.name, self.trouble, self.verbs, self.not_verbs, self.lines = name, None, [], [], collections.defaultdict(list)

    @functools.cached_property
    def leads(self):
        """The words that most of its starts and turns have: "snail", who is in all of it."""
        texts = [words_of(text) for key in ("start", "turn") for text in self.lines[key]]
        return {word for word, times in collections.Counter(word for words in texts for word in words).items() if 2 * times > len(texts)}

    @functools.cached_property
    def words(self):
        """All words of its lines, so that nobody else in the story is a second one of those who are in it."""
        return set().union(*(words_of(text) for texts in self.lines.values() for text in texts))

    def read(self, key, value):
        """Take up the line "KEY: VALUE" of its file. Raises ValueError for one that is none of a plot's."""
        if key == "for" and value.split()[:1] and value.split()[0] in TROUBLES:
            self.trouble, *self.verbs = value.split()
        elif key == "not" and self.trouble == "wish" and not self.verbs and value:
            self.not_verbs = value.split()
        elif key in self.KEYS and self.trouble:
            self.lines[key].append(text := parse(re.sub(r'([!?]" )(?=\(?[a-z])', rf"\1{KEPT}", value)))
            about = {"wish"} if self.trouble == "wish" else set() if self.trouble in GOALLESS else {"goal"}
            if unknown := roots(text) - {"hero", *PRONOUNS["he"], *({"it"} if " " in key else ()), *about}:
                raise ValueError(f"plot {self.name}: no slot {{{min(unknown)}}} in its {key!r}")
        else:
            line = f"{key}: {value}" if value else key
            raise ValueError(f"plot {self.name}: wanted for: TROUBLE, then its lines, found {line[:60]!r}")


def read_plots(path, grammar):
    """Add the plots, beginnings, rules and questions of the file at PATH to GRAMMAR. Raises ValueError with file and line for what is wrong."""
    plot = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key, _, value = (part.strip() for part in line.partition(":"))
        try:
            if not line.strip() or line.startswith("#"):
                continue
            if key.startswith("rule "):
                grammar.rules[key[5:].strip()].append(parse(value))
            elif key.startswith("opening "):
                grammar.openings.append(Opening(key.split()[1:], parse(value)))
            elif key.startswith("q "):
                if value.count("=") != 1:
                    raise ValueError(f"wanted question = answer, found {value[:60]!r}")
                grammar.questions[key[2:]].append(tuple(parse(side.strip()) for side in value.split("=")))
            elif line.startswith("plot "):
                name = line.split(maxsplit=1)[1]
                if name in grammar.plots:
                    raise ValueError(f"a second plot named {name}")
                plot = grammar.plots[name] = Plot(name)
            elif plot:
                plot.read(key, value)
            else:
                raise ValueError(f"stands in no plot: {line[:60]!r}")
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None


class Happening:
    """What a plot goes on from: `begin` [Sequence], ways to tell it, `trouble` what it is, one of TROUBLES, and `goal` what that is about, a Sequence or
    None; `lists` {slot: [what it may be, ...]}."""

    def __init__(self, name):
        self.name, self.begin, self.trouble, self.goal, self.lists = name, [], None, None, {}


class Situation(Happening):
    """Something that happens, told as a user may write it; `lists` of "hero", "friend" and "other" are their kinds."""

    def __init__(self, name):
        super().__init__(name)
        self.fits_any = name.startswith("plain-")                                   # any hero, thing, place and deed

    @functools.cached_property
    def says(self):
        """All slots of its texts, in their forms."""
        return {slot for text in self.begin for slot in slots(text)}

    @functools.cached_property
    def calls_by_name(self):
        """Those of ROLES whose texts want a name: they say the kind besides, "{hero} the dog", "a dog named {hero}"."""
        called = {slot for text in self.begin for before, slot, behind in zip(["", *text], text, [*text[1:], ""])
                  if isinstance(slot, Slot) and (re.match(" the [a-z]", str(behind)) or str(before).endswith(" named "))}
        return {role for role in ROLES if role in called or f"{role}.kind" in self.says}

    @functools.cached_property
    def told_by_one(self):
        """Whether a user tells of himself in it."""
        return any(of_one(literal(text)) and "hero" not in roots(text) for text in self.begin)

    def draw_cast(self, grammar, rng):
        """A Cast of it: its people, of the kinds that it names, no two alike, and an entry of each of its lists. Raises ValueError where they always
        are alike."""
        alike = lambda one, other: one.name[:2] == other.name[:2] if one.name and other.name else one.kind == other.kind
        for _ in range(1000):
            people = [self.draw_person(role, grammar.words, rng) for role in ROLES]
            if not any(alike(one, other) for one, other in itertools.combinations(people, 2)):
                break
        else:
            raise ValueError(f"situation {self.name}: hero, friend and other are always alike")
        characters = dict(zip(ROLES, people))
        characters["helper"] = draw_helper(grammar.words, rng, characters)
        cast = Cast(grammar, rng, characters)
        for slot, entries in self.lists.items():
            if slot not in ROLES:
                cast[slot] = rng.choice(entries)
        if "thing" in cast:
            cast.thing, cast.adjective = cast["thing"], ""
        if "place" in cast:
            cast.place = ("at", cast["place"])
        return cast

    def draw_person(self, role, words, rng):
        """A Character for ROLE, of one of its kinds, of which "any", "child" and "animal" stand for many; a hero who may be several animals is
        often another one. With a name, mostly, and always where a text says the kind besides."""
        kinds = self.lists.get(role, ["any"])
        kind = rng.choice(kinds)
        if role == "hero" and len(kinds) > 1 and set(kinds) <= set(words["animals"]) and rng.random() < 0.5 and not any(
                NO_OTHER["animal"].search(literal_of_all(text)) for text in self.begin):
            kind = "animal"
        if kind == "any":
            kind = rng.choice(["child", "child", "animal", "animal", "creature", "adult"])
        kind = rng.choice({"adult": words[rng.choice(["he people", "she people"])], "child": ["boy", "girl"], "animal": words["animals"],
                           "creature": words["creatures"]}.get(kind, [kind]))
        sexes = [sex for sex in PRONOUNS if kind in (*words[f"{sex} people"], *words[f"{sex} family"])]      # boys and girls are among them
        gender = SEX.get(kind) or rng.choice(sexes or list(PRONOUNS))
        named = kind in ("boy", "girl") or role in self.calls_by_name or rng.random() < 0.8
        name = draw_name(words, rng, gender, 0.0 if sexes else 0.4) if named else None
        if name and f"a {role}" not in self.says and role not in self.calls_by_name and sexes and kind not in ("boy", "girl") and rng.random() < 0.2:
            name = f"{rng.choice(TITLES[gender])} {name}"
        return Character(kind, name, gender)


def of_one(text):
    """Whether who tells TEXT is in it: "My grandma has a drawer", but not what somebody says there."""
    return re.search(r"\b(I|[Mm]y|[Mm]e|[Ww]e|[Oo]ur)\b", re.sub(r'"[^"]*"', "", text)) is not None


def read_happenings(path, word, known, make, reads):
    """Add to KNOWN, {name: a Situation or Premise}, those of the file at PATH, which begin with a line "WORD NAME" and are made by MAKE(name): how each is
    begun and what its trouble is. All other lines go to READS(the last one or None, key, value), which says whether it has understood one. Raises
    ValueError with file and line for what is wrong."""
    one = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key, colon, value = (part.strip() for part in line.partition(":"))
        trouble, about, goal = value.partition(" = ")
        try:
            if line.startswith(f"{word} "):
                name = line.split(maxsplit=1)[1]
                if name in known:
                    raise ValueError(f"a second {word} named {name}")
                one = known[name] = make(name)
            elif colon and one and key == "begin":
                one.begin.append(parse(value))
            elif one and key == "trouble" and trouble in TROUBLES and (trouble in GOALLESS) == (not about):
                one.trouble, one.goal = trouble, parse(goal) if goal else None
            elif line.strip() and not line.startswith("#") and not (colon and reads(one, key, value)):
                raise ValueError(f"not understood: {line[:60]!r}")
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None
    for one in known.values():
        if not (one.begin and one.trouble):
            raise ValueError(f"{word} {one.name}: wanted begin and trouble")


def read_situations(path, grammar):
    """Add the situations of the file at PATH to GRAMMAR. Raises ValueError for what is wrong there."""
    def reads(situation, key, value):
        if situation is None or key in ("begin", "trouble") or not re.fullmatch(r"[a-z]+\d?", key):
            return False
        names = [name.strip() for name in value.split(",") if name.strip()]
        situation.lists[key] = names if key in ROLES else [entry for name in names for entry in grammar.words.get(name) or [name]]
        return True

    read_happenings(path, "situation", grammar.situations, Situation, reads)
    for situation in grammar.situations.values():
        used = {"hero"}.union(*map(roots, situation.begin), roots(situation.goal or ()))
        if unused := situation.lists.keys() - used:
            raise ValueError(f"situation {situation.name}: no text has {{{min(unused)}}}, which it lists")


class Premise(Happening):
    """What a request asks for, told as a beginning in which every noun is a slot: a few ways to tell whatever was named, so that it is copied and
    nothing is told that nobody asked for. `begin` is what happens, behind how the hero is met; `about` [tag, ...] what requests for it may be worded by,
    beside rules for any; `often` how often it is drawn; `only_told` the member of which nothing more is told, or None."""

    def __init__(self, name):
        super().__init__(name)
        self.about, self.often, self.only_told = [], 1, None


def read_premises(path, grammar):
    """Add the premises and rules of the file at PATH to GRAMMAR. Raises ValueError for what is wrong there."""
    def reads(premise, key, value):
        if key.startswith("rule "):
            grammar.rules[key[5:].strip()].append(parse(value))
        elif premise and key == "often" and value.isdigit():
            premise.often = int(value)
        elif premise and key == "only told" and value in MEMBERS:
            premise.only_told = value
        elif premise and key == "about":
            premise.about = value.split()
        elif premise and key in ("thing", "friend", "trait", "weather", "nature", "event"):
            names = [name.strip() for name in value.split(",")]
            premise.lists[key] = [entry for name in names for entry in grammar.words.get(name) or [name]]
        else:
            return False
        return True

    read_happenings(path, "premise", grammar.premises, Premise, reads)


class Opening:
    """A beginning that does not say its trouble: `text` with the slots it uses, `gender` and `kind` of its hero (None: anybody), `friend` its friend's
    gender or None, `pair` whether hero and friend are two of a kind."""

    def __init__(self, head, text):
        self.text, self.pair = text, "pair" in roots(text)
        self.gender, self.kind, self.friend = (head + [None, None])[:3]

    @property
    def starts_with_slot(self):
        """Whether its first word is a slot, once it is drawn."""
        return isinstance(next(filter(None, self.text)), Slot)

    def drawn(self, grammar, rng):
        """This opening with its alternatives drawn: only its slots are open."""
        return Opening([self.gender, self.kind, self.friend], settled(grammar, self.text, rng))

    def characters(self, grammar, rng):
        """Characters for the cast, hero and friend as the text has them; with names where it says both name and
        kind, as in "a fox named Pip"."""
        words, characters = grammar.words, draw_characters(grammar.words, rng)
        if self.kind is None:
            while {"hero", "hero.kind"} <= set(slots(self.text)) and not characters["hero"].name:       # "a fox named the fox"
                characters = draw_characters(words, rng)
            entitle(words, rng, characters["hero"])
            return characters
        kind = rng.choice(words["animals"]) if self.kind == "animal" else self.kind.replace("-", " ")
        characters["hero"] = Character(kind, draw_name(words, rng, self.gender, 0.1), self.gender)
        if self.friend:
            characters["friend"] = Character({"he": "boy", "she": "girl"}[self.friend], draw_name(words, rng, self.friend, 0.0), self.friend)
        for one in characters.values():
            one.owner = one.owner and characters["hero"]
        return characters


# 7. Stories

# The slots for who is named in a beginning and is neither hero nor friend.
FURTHER = ("name", "user", "made-up name")

# What is always asked for where it matters: no story of a deed is told to somebody who asked for none.
SPECIAL = ("deed", "fear", "job", "trait", "food", "weather")

# {he} {him} {his} {himself} of heroes of plots who are neither he nor she.
OTHER_PRONOUNS = {"I": ("I", "me", "my", "myself"), "it": ("it", "it", "its", "itself"), "they": ("they", "them", "their", "themselves")}

# Who is of one sex by the word for him.
GENDERED = re.compile(r"(?i)\b(?:king|queen|prince|princess|[a-z]*(?<!hu)man|woman|lady|boy|girl|mother|father|mom|mommy|mama|dad|daddy|papa|aunt|uncle|"
                      r"grandma|grandpa|sister|brother|"
                      r"wife|husband|son|daughter|witch|wizard|knight|nun|monk|maid|nephew|niece)$")


def titled(name, text):
    """NAME with the title that it has anywhere in TEXT, "Aunt Mia"."""
    match = re.search(rf"\b(?:{'|'.join(map(re.escape, TITLED))}) {re.escape(name)}\b", text)
    return match[0] if match else name


def as_told_by_me(text):
    """TEXT in which "I" stands for a name in any place but in speech, as one tells of oneself: "I said" for "said I", "my nose" for "the nose of I"."""
    no_object, parts = {"and", "than", "as", "or", "was", "is", "came", "popped", "did", "stood", "back"}, text.split('"')
    for i in range(0, len(parts), 2):                           # what nobody says
        part = re.sub(rf"^ (?:{SAID[1:-1]}|[a-z]+ed) I\b", lambda match: f" I {match[0].split()[0]}", parts[i]) if i else parts[i]
        part = re.sub(r"\b(went|came|ran|sat|stood|lay|said|thought|wondered|sighed|cried) I\b", r"I \1", part)
        part = re.sub(r"\b(I [a-z]+), who\b", r"\1, and I", part)
        part = re.sub(r"\bI and (my (?:[a-z]+ )?[a-z]+|[A-Z][a-z]+)\b", r"\1 and I", part)
        part = re.sub(r"(^|[.!?] |\n)my\b", r"\1My", part)
        part = re.sub(r"\bthe ([a-z]+) of I\b", r"my \1", part)
        part = re.sub(r"\b(between (?:(?:my|the|an?) )?(?:[\w-]+ ){1,2}and) I\b", r"\1 me", part)
        part = re.sub(r"\b(gave|told|asked|showed|helped|pulled|took|made|brought|followed|led|let|called|watched|watching|praised|patted|tickled|"
                      r"at|from|to|behind|beside|with|of|around|under|past|onto|into|toward|between|against) I\b", r"\1 me", part)
        parts[i] = re.sub(r"(\w+) I(?=[.,!?]| (?:and|with|to|from|in|on|at) )",
                          lambda match: match[0] if match[1] in no_object else f"{match[1]} me", part)
    return '"'.join(parts)


def places_of(part, text):
    """[where PART stands in TEXT, ...]"""
    places, place = [], text.find(part)
    while place >= 0:
        places.append(place)
        place = text.find(part, place + 1)
    return places


class Story:
    """A plot told behind a beginning: `text`, of which the first `length` characters are up to the plot's turn, and the first `until_start` up to the end
    of its start; `begun` the beginning, `cast` who is in it; `source` what it goes on from. `foreign` whether the beginning is told as a user's, `own`
    whether it is one of ours as it stands. `named` [(sort, phrase)] is what the beginning names, but its hero, in its order: ("thing", "the red kite"),
    ("person", "Max"). `hero` the Character whom it is about: whom it has a slot for; else "I", where somebody tells of himself; else what it names first.
    `trouble` what the plot is for, `goal` what that is about, as a phrase, or None; `absent` phrases of what is not there, "no money", or the other one of
    two who quarrel, and has no line; `sorts` {noun: sort} of nouns put in for others of that sort. If it was asked for, `deeds` what its hero does, "loses
    her hat", or `happening` what else happens, "all the lights go out", as requests say it; else "". `brief` whether it is short: of up to 270 words, with
    one line for each of three at most, and a second for one of them at most. `plot` is what is told, `lines_told` the texts of it so far, `names` those of
    people in the beginning but the hero's, `used` a premise's slots. Of a request: `must` [(slot, cast)] of what it has to name, `extra` of what has no
    part in the cast; see PremiseStory."""

    def __init__(self, grammar, rng, source, named=False, asked=False):
        """Go on from SOURCE, an Opening, Situation or Premise, as a user has written it, with a plot for its trouble; NAMED: its first word is a slot. ASKED: a
        user has only asked for it, and it begins with how its hero is met, and tells nothing else than what was asked for. Draw until no sentence occurs
        twice and the held-out requests stay fresh. Raises ValueError after 20 tries, and at once where what was drawn names nobody, not its hero, not
        what the trouble is about, no trouble that is known, or nothing to tell of; where the wish is another's, or "I" am one of two who quarrel; and
        where what was asked for does not tell its trouble."""
        self.grammar, self.rng, self.source, self.foreign, self.deeds, self.happening = grammar, rng, source, not asked, "", ""
        self.must, self.extra, self.used = [], [], set()
        for _ in range(20):
            self.brief = asked and rng.random() < 0.2
            goal = self.begin(source, named, asked)
            others = self.draw_others()
            self.own = isinstance(source, Situation) and not others
            self.exchange(others, goal)
            if grammar.held_out.refuses(self.to_be_kept_apart()):
                why = "is held out"
                continue
            if self.trouble == "wish" and self.hero.kind.split()[-1] in goal.split() or self.trouble == "quarrel" and self.hero.gender == "I":
                raise ValueError(f"nobody to tell it of: {self.begun}")        # another one's wish; and two of whom one is "I" are "we"
            self.plot = self.draw_plot(goal)
            self.tell()
            self.brief &= self.number_of_words <= 270
            if not (twice := repeats(self.text)):
                return
            why = f"repeats {twice!r}"
        raise ValueError(f"{self.begun!r}: always {why}")

    def begin(self, source, named, asked):
        """Make the cast, and `begun` of SOURCE, with its hero and all that it names; returns what its trouble is about."""
        grammar, rng = self.grammar, self.rng
        text, self.sorts = self.draw(source, named), {}
        self.begun = tidy(grammar.expand(text, self.cast, rng))
        told, members = set(slots(text)), roots(text)
        self.names = []
        told_goal = getattr(source, "goal", None)
        self.hero = self.find_hero(members, grammar.expand(told_goal, self.cast, rng).split()[-1] if told_goal else "")
        if asked and isinstance(source, Situation):
            self.tell_what_is_asked(source)
        self.names = [one.name for role, one in self.cast.characters.items()
                      if one is not self.hero and one.name and role in members and re.search(rf"\b{re.escape(one.name)}\b", self.begun)]
        self.names += [name for slot in FURTHER if slot in told for name in [titled(self.cast[slot], self.begun)]
                       if name != self.hero.name and not (self.hero.name and name.startswith(f"{self.hero.name} "))]
        self.named = self.all_named()
        read = isinstance(source, Opening)
        self.trouble, goal = self.read_trouble(alone=not members & {"friend", "other"}) if read else self.told_trouble(source)
        return goal

    def exchange(self, others, goal):
        """Exchange the nouns of OTHERS, {noun: another}, in all that is told so far, and in GOAL."""
        self.begun, self.goal, self.deeds, self.happening = (
            text and self.exchanged(text, others) for text in (self.begun, goal, self.deeds, self.happening))
        before, self.named = self.named, self.all_named()
        seen = {phrase.split()[-1] for _, phrase in self.named}
        swapped = [(sort, re.sub(rf"\b{noun}$", other, phrase)) for sort, phrase in before for noun, other in others.items()
                   if phrase.split()[-1] == noun and other not in seen]
        there = [one for one in swapped if one[1].split()[-1] in self.begun]                   # what no list has, too
        self.named = sorted([*self.named, *there], key=lambda one: self.at(one[1]))[:6]

    def draw_plot(self, goal):
        """A plot for the trouble, which is about GOAL; if possible none that is about one of those in the story."""
        plots = self.grammar.plots_for[self.trouble]
        fit = [each for each in plots if each.verbs and goal.split()[0] in each.verbs]
        fit = fit or [each for each in plots if not each.verbs and not (self.trouble == "wish" and goal.split()[0] in each.not_verbs)]
        kinds = {one.kind.split()[-1] for one in self.cast.characters.values() if one.kind in self.begun}
        kinds |= {phrase.split()[-1] for _, phrase in self.named}
        return self.rng.choice([each for each in fit if not kinds & each.leads] or fit)

    def clause(self):
        """What may be said of the hero, with things that are not of this story: "who glowed in the dark"."""
        return tidy("-" + self.grammar.expand_rule("past clause", Cast(self.grammar, self.rng, self.cast.characters), self.rng))[1:]

    def at(self, phrase):
        """Where `begun` has the noun of PHRASE, "the red kite", first."""
        return self.begun.lower().find(re.sub(r"^(?:.*'s|[^ ]+) (?=.)", "", phrase).lower())

    def wish(self, alone):
        """What the hero wants to do, or cannot: "go swimming"; None if the beginning does not say. ALONE: "he" is nobody else."""
        hero = self.cast.characters["hero"]
        who = "|".join([re.escape(hero.name or hero.kind), rf"[Tt]he (?:[a-z]+ )?{re.escape(hero.kind)}", *[hero.gender, hero.gender.title()] * alone])
        match = re.search(rf"(?<!when )(?<!if )\b(?:{who}) {WISHES} {PHRASE}", self.begun)
        return match[1] if match and not NO_WISH.search(match[1]) else None

    def tell_what_is_asked(self, situation):
        """Leave of `begun` how its hero is met and what a user says that happens, `deeds` of his or a `happening`, so that nothing is told that nobody
        asked for. Raises ValueError where that does not tell of SITUATION's trouble."""
        told = deeds_of(self)
        self.deeds, event = " and ".join(now for now, _ in told), None if told else happening_of(self)
        if not (told or event):
            raise ValueError(f"what happens? {self.begun}")
        self.happening, kept = (event[0], [event[1]]) if event else ("", [sentence for _, sentence in told])
        sentences, met = whole_sentences(self.begun), []
        while sentences and sentences[0] not in kept and re.match("(?:Once|There|This is) ", sentences[0]):
            met.append(sentences.pop(0))
        if situation.trouble in GOALLESS and situation.trouble != "plain" and sentences != kept:
            raise ValueError(f"its trouble is not asked for: {self.begun}")
        if re.search(r"^[^,.]*\b(?:it|him|them|ones?|there|here)\b|, too\b|\b(?:again|also)\b|'", self.deeds or self.happening):
            raise ValueError(f"of what was not told: {self.begun}")
        if re.fullmatch(r"(?:tries|listens|looks|nods|stops|waits|agrees|goes on|thinks|asks|laughs|smiles)", self.deeds):
            raise ValueError(f"what does he? {self.begun}")
        if re.match("(?:But|And|Then|So|Now|It|That|This) ", kept[0]):
            raise ValueError(f"what was before? {self.begun}")
        self.begun = " ".join(met + kept)
        if not re.search(rf"\b{re.escape(str(self.hero).removeprefix('the '))}\b", self.begun):
            raise ValueError(f"nobody asked for {self.hero}: {self.begun}")
        friend, said = self.cast.characters["friend"], IS.get("gone" if situation.trouble == "away" else situation.trouble)
        goal = situation.goal and self.grammar.expand(situation.goal, self.cast, self.rng)
        if (situation.trouble in ASKED_WITH and not ASKED_WITH[situation.trouble].search(self.deeds or self.happening)
                or said and not is_said(self.begun, head(goal).split()[-1], said)
                or situation.trouble == "weather" and head(goal).split()[-1] not in self.begun
                or situation.trouble == "quarrel" and not re.search(rf"\b{re.escape(friend.name or friend.kind)}\b", self.begun)):
            raise ValueError(f"nobody asked for its trouble: {self.begun}")
        if situation.trouble == "wish" and (goal.split()[0] not in self.begun or any(
                phrase.split()[-1] not in self.begun for phrase in self.grammar.nouns.noticed(goal, set()))):
            raise ValueError(f"nobody asked to {goal}: {self.begun}")

    @property
    def number_of_words(self):
        return len(self.text.split())

    def is_as_long(self, asked):
        """Whether this is as long as the request ASKED says: brief for a short story, of up to 190 words for a very short one, of 330 or more for a long
        one."""
        if SHORT.search(asked) and not self.brief or VERY_SHORT.search(asked) and self.number_of_words > 190:
            return False
        return not LONG.search(asked) or self.number_of_words >= 330

    def to_be_kept_apart(self):
        """The words that a held-out request may not have two of."""
        return [phrase.split()[-1] for _, phrase in self.named] + [self.hero.kind]

    @property
    def of_its_cast(self):
        return self.hero is self.cast.characters["hero"]

    def draw(self, source, named):
        """A text of SOURCE, NAMED as above, with its alternatives drawn; makes the cast."""
        grammar, rng = self.grammar, self.rng
        if isinstance(source, Situation):
            texts = [text for text in source.begin if not named or isinstance(text[0], Slot)]
            if not texts:
                raise ValueError(f"situation {source.name}: no beginning starts with a slot")
            text = settled(grammar, rng.choice(texts), rng)
            self.cast = source.draw_cast(grammar, rng)
            if not named:
                text = self.led_up_to(text)
        else:
            text = source.text
            self.cast = Cast(grammar, rng, source.characters(grammar, rng))
        if rng.random() < 0.25:
            self.cast.invent()
        for before, slot in zip(text, text[1:]):
            if slot == "name" and (sex := TITLED.get((str(before).split() or [""])[-1])):                        # no Aunt Stuart
                self.cast["name"] = rng.choice(grammar.words[f"{sex} names"])
        if "clause" in roots(text):
            self.cast["clause"] = self.clause()
        return text

    def led_up_to(self, text):
        """TEXT, now and then, and mostly where it is asked for, behind a first meeting with its hero, or with a scene."""
        hero = self.cast.characters["hero"]
        met = {"a hero", "hero.kind"} & set(slots(text)) or re.search(rf"\ban? (?:[a-z]+ )?{re.escape(hero.kind)}\b", literal(text))
        pointing = re.match("(?:It|They|This|That)\\b", literal(text))
        if "hero" in roots(text) and not (met or of_one(literal(text)) or " " in (hero.name or "") or pointing) and (
                self.rng.random() < (0.25 if self.foreign else 0.8)):
            return Sequence([Rule("meet"), " ", *text])
        habit = re.search(r"\b(every|always|whenever|at night|tonight)\b", literal(text), re.I)
        somewhere = re.search(r"\b(?:in|on|at|under|behind|over|above|below|inside|near) (?:the|an?|his|her|x)\b", literal(text))
        if "hero" in roots(text[:1]) and not STATE.match(str(text[1])) and not habit and not somewhere and self.rng.random() < 0.3:
            return Sequence([Rule("scene"), " ", *text])
        return text

    def find_hero(self, members, goal):
        """The hero of `begun`, which has slots of MEMBERS, and is not what the trouble is about, of which GOAL is the noun; the cast gets his
        pronouns and name. Raises ValueError where it has none."""
        hero = self.cast.characters["hero"]
        if "hero" not in members:
            if of_one(self.begun):
                hero = Character("child", "I", "I")
            elif "friend" in members and re.search(rf"\b{re.escape(str(self.cast.characters['friend']).removeprefix('the '))}\b", self.begun):
                hero = self.cast.characters["friend"]
            else:
                hero = self.first_named(goal)
        elif not re.search(rf"\b{re.escape(str(hero).removeprefix('the '))}\b", self.begun):
            hero = Character(hero.kind, None, hero.gender)          # "a fox" whose name is not said
            if not re.search(rf"\b{re.escape(hero.kind)}\b", self.begun):
                raise ValueError(f"nobody says who it is: {self.begun}")
        pronouns = OTHER_PRONOUNS.get(hero.gender) or PRONOUNS[hero.gender].values()
        self.cast.update(zip(PRONOUNS["he"], pronouns), hero=str(hero))
        return hero

    def first_named(self, goal):
        """What `begun` names first, as a hero, but the noun GOAL: "the cup", it; "the ducks", they; a place or the night, or what something lies in,
        only where there is nothing else. Raises ValueError where it names nothing."""
        words, text = self.grammar.words, re.sub(r'"[^"]*"', lambda match: "-" * len(match[0]), self.begun)
        phrases = [phrase for each in (text, self.begun) for phrase in self.grammar.nouns.noticed(each, set())
                                if phrase.split()[-1] != goal and self.is_there(phrase)]
        if not phrases:
            raise ValueError(f"nobody there: {self.begun}")
        inside = (r"(?i)\b(?:in|on|at|under|behind|by|near|from|of|into|to|over|through|beside|with|before|after) (?:(?:an?|the|his|her|my) (?:[a-z]+ )?)?$|"
                  r"said (?:not )?an? $")
        subjects = [phrase for phrase in phrases if self.sort(phrase) not in ("place", "nature")
                    and not re.search(inside, self.begun[:max(self.at(phrase), 0)])]
        if goal and not subjects:
            phrases = [phrase for phrase in self.grammar.nouns.noticed(text, set()) if phrase.split()[-1] == goal] or phrases
        phrase = (subjects or phrases)[0]
        noun = phrase if phrase[0].isupper() else self.grammar.nouns.parted(phrase)[2]
        said = re.findall(r"\b(he|his|him|himself|she|her|herself|its|itself|it(?! (?:was|is|rained|snowed|got)\b))\b",
                          self.begun[max(self.at(phrase), 0):].lower())
        sex = "it" if not said or said[0].startswith("it") else "she" if said[0] in ("she", "her", "herself") else "he"
        sexes = [sex for sex in PRONOUNS if noun.lower().split()[0] in (*words[f"{sex} people"], *words[f"{sex} family"])]
        if sexes and (sex == "it" or len(sexes) == 1 and GENDERED.search(noun)):
            sex = sexes[0]
        if sex == "it" and self.sort(phrase) == "person":
            sex = "she" if re.search("(?i)(sister|mom|mother|aunt|gran|niece|woman|lady|queen|girl|wife|maid)", noun) else "he"
        sex = TITLED.get(noun.split()[0]) or sex
        return Character(noun, noun if noun[0].isupper() else None, "they" if self.sort(phrase) == "many" else sex)

    def all_named(self):
        """[(sort, phrase)] of what `begun` names but its hero, the first six of it."""
        hero, nouns = self.hero, self.grammar.nouns
        kinds = {word for one in self.cast.characters.values() if one.name in self.names for word in one.kind.split()}
        hidden = kinds | {word.lower() for name in (hero.kind, hero.name or "", *self.names) for word in name.split()}
        who = f"(?:{re.escape(str(hero))}|(?i:{self.cast['he']}))"
        if re.search(" (?:was|is|played) (?:an?|the) ", self.begun):                                             # he himself: "Pip was a shy fox."
            hidden |= set(re.findall(rf"\b{who} (?:was|is|played) (?:an?|the) (?:(?!to |who |that )[a-z]+ )*?([a-z]+)"
                                     "(?=[,.!?]| who| that| of| in| on| at| from| with)", self.begun))
        if f"{hero}, " in self.begun or f"{hero} the " in self.begun:                                              # "Mr. Plum, the mailman, ..."
            also = rf"\b{re.escape(str(hero))}(?:, (?:the|an?|{self.cast['his']}) ((?:[a-z-]+ )?[a-z]+),| the ([a-z]+))"
            hidden |= {word for match in re.finditer(also, self.begun) for word in (match[1] or match[2]).split()}
        for name in self.names:
            hidden |= set(re.findall(rf"\b{re.escape(name)}, (?:the|an?|his|her) (?:[a-z-]+ )?([a-z]+)[,.]", self.begun))
        hidden |= set(re.findall(r", who (?:was|is) an? (?:[a-z-]+ )?([a-z]+)", self.begun))                     # "the shopkeeper, who was a mongoose"
        no_noun = UNTOLD | nouns.adjectives
        named = "|".join(map(re.escape, self.names)) or "-"                                                     # "her neighbor Ann" is one
        told = lambda last: not no_noun & {last, nouns.forms.get(last)} and not re.search(rf"\b{re.escape(last)} (?:{named})\b", self.begun)
        phrases = [phrase for phrase in nouns.noticed(self.begun, hidden) if told(phrase.split()[-1]) and self.is_there(phrase)] + self.names
        kin = {match[0].split()[-1] for match in KIN.finditer(self.begun)}
        his = self.cast["his"]
        phrases = [re.sub("^the ", f"{his} ", phrase) if phrase.split()[-1] in kin else phrase for phrase in phrases]
        phrases = [phrase if phrase.startswith(f"{his} ") else re.sub("^(?:his|her) ", "the ", phrase) for phrase in phrases]        # the friend's
        phrases = list({nouns.forms.get(last, last): phrase for phrase in reversed(phrases) for last in [phrase.split()[-1]]}.values())
        met = next((match.start() for match in re.finditer(rf"\b{re.escape(str(hero).removeprefix('the '))}\b", self.begun)), -1)
        too_early = lambda phrase: phrase.split()[-1] not in kin and 0 <= self.at(phrase) < met             # nobody knows yet whose it is
        phrases = [re.sub(f"^{his} ", "the ", phrase) if too_early(phrase) else phrase for phrase in phrases]
        if hero.gender == "I":
            phrases = [re.sub("^the ", "my ", phrase) if re.search(rf"\b[Mm]y (?:[a-z]+ )?{re.escape(phrase.split()[-1])}\b", self.begun) else phrase
                       for phrase in phrases]
        return [(self.sort(phrase), phrase) for phrase in sorted(phrases, key=self.at)][:6]

    def is_there(self, phrase):
        """Whether what PHRASE names, "the porridge", is there at all: not what something is only like, "thick as porridge", nor what somebody says that
        he is or plays, nor the place from which somebody came or where he wants to go, nor rain of yesterday."""
        noun = phrase.split()[-1]
        begun = re.sub(rf"\b{NOUN} (?:by|after|to) {NOUN}\b", "", self.begun.replace(noun, NOUN))           # plank by plank
        said = [begun[:match.start()].lower() for match in SAID_OF.finditer(begun) if not begun.startswith("'s", match.end())]
        if not said:
            return f"{NOUN}'s" not in begun and (noun not in ("rain", "snow") or re.search(rf"(?<!not )(?<!not even )\b{noun}ing\b", self.begun) is not None)
        return not all(NOT_THERE.search(before) for before in said)

    def told_trouble(self, situation):
        """(trouble, goal) as SITUATION says. Raises ValueError where the beginning does not name the goal."""
        if situation.goal is None:
            return situation.trouble, None
        goal = self.grammar.expand(situation.goal, self.cast, self.rng)
        if situation.trouble == "wish":
            return "wish", goal
        last = head(goal).split()[-1]
        if last == self.hero.kind.split()[-1] and not NOT_ALIVE.search(goal):   # a bear may have a teddy bear
            return ALONE.get(situation.trouble, "fix"), None
        if last not in self.begun and situation.trouble != "weather":
            raise ValueError(f"situation {situation.name}: {goal!r} is not in {self.begun!r}")
        for _, phrase in self.named:
            if phrase.split()[-1] == last and goal == head(goal) and len(goal.split()) <= len(phrase.split()) and not (
                    situation.trouble == "want" and re.match("(?:an?|another|some|one) ", goal)):
                return situation.trouble, phrase
        return situation.trouble, goal if re.match("(?:the|an?|another|some|his|her|my|no|one) |[A-Z]", goal) else f"the {goal}"

    def to_be_asked(self):
        """The slots that can be asked about: those of friend, place and thing that stand in `begun` as the cast has them. The cast's place gets the
        preposition that is before it there."""
        cast, (_, place) = self.cast, self.cast.place
        found = ["friend"] * (cast["friend"].removeprefix("the ") in [phrase.removeprefix("the ") for _, phrase in self.named])
        if where := re.search(rf"\b{WHERE} (?:the|an?) {re.escape(place)}\b", self.begun):
            cast.place = (where[1], place)
            found.append("place")
        if cast.thing in self.grammar.words["things"] and re.search(rf"\b(an?|the|his|her) {re.escape(cast['thing.noun'])}\b", self.begun):
            found.append("thing")
        return found

    def read_trouble(self, alone):
        """(trouble, goal) of a beginning that does not say it; ALONE: "he" is nobody but the hero. Raises ValueError where it has none that is known."""
        if self.of_its_cast and (wish := self.wish(alone)) and wish != "go":
            return "wish", wish
        if re.search(r"\b(?:enough for|happy|liked it)\b", sentences(self.begun)[-1]):
            return "plain", None
        alive = lambda sort, one: sort in ("person", "animal") or one in self.grammar.nouns.animals | self.grammar.nouns.people
        told = [(sort, phrase, noun, re.sub(                     # "the boy in the attic would not answer" is not of the attic
            rf"(?i)\b(?:in|on|at|of|under|behind|by|near|from) (?:the|an?|his|her) (?:[a-z]+ )?{re.escape(noun)}\b", "", self.begun))
                for sort, phrase in self.named if sort != "nature" for noun in [phrase.split()[-1]]]
        for trouble in IS:
            for sort, phrase, noun, not_there in told:
                if is_said(self.begun if trouble in ("want", "afraid") else not_there, noun, IS[trouble]) and (
                        trouble not in ("wrong", "sad") or alive(sort, self.grammar.nouns.singular(noun)) == (trouble == "sad")):
                    return "away" if trouble == "gone" and alive(sort, noun) else trouble, phrase
        words = (self.hero.name or self.hero.kind).split()[-1], self.cast["he"], self.cast["he"].capitalize()
        if any(is_said(self.begun, word, IS["sad"]) for word in words):
            return "low", None
        if WORRY.search(self.begun) or not AT_PEACE.search(sentences(self.begun)[-1]):
            raise ValueError(f"what is the trouble? {self.begun}")
        return "plain", None

    def sort(self, phrase):
        """What the PHRASE is, by the word lists: a place is one that is no thing besides."""
        words, nouns = self.grammar.words, self.grammar.nouns
        noun = nouns.parted(head(phrase))[2].lower()
        if phrase in self.names or phrase[0].isupper():
            return "person"
        if noun in self.sorts:                                  # it stands for a noun of that sort
            return self.sorts[noun]
        if noun in {one.kind for one in self.cast.characters.values()}:
            return "person" if noun in nouns.people or noun.split()[-1] in PEOPLE else "animal"
        one, last = nouns.singular(noun), noun.split()[-1]
        if last == "children":
            return "many"
        if last in MORE_PLACES:
            return "place"
        if noun in nouns.places and noun not in GREAT and noun not in words["things"] and noun not in SEATS:
            return "place"                                      # the woods, the stairs
        if one != noun or last.endswith("s") and not re.search("(ss|us|is)$|^(canvas|atlas|lens|gas)$", last):
            return "many"
        alive = not NOT_ALIVE.match(noun) and noun not in words["things"]
        if one in nouns.people or alive and (last in PEOPLE or last in nouns.people or last.endswith(("man", "lady"))):
            return "person"
        if " " in noun and alive and last not in words["things"]:
            if last in nouns.animals:
                return "animal"
            if last in nouns.places and last not in SEATS and last not in SMALL:
                return "place"
        if noun in GREAT:
            return "nature"
        if one in nouns.animals or one in nouns.beings - {"house", "wave"}:
            return "animal"
        wide = one in nouns.places and one not in words["things"] and last not in SMALL and one not in SEATS
        return "place" if wide or one in nouns.events or last in nouns.events else "thing"

    def draw_others(self):
        """{noun: another of its sort} for some of those that `begun` names, one in ten such as there are not, so that any is learned."""
        words, rng, others = self.grammar.words, self.rng, {}
        singular = self.grammar.nouns.singular
        for sort, phrase in self.named:
            noun = self.grammar.nouns.parted(phrase)[2]
            if rng.random() > 0.35 or not self.is_replaceable(sort, noun):
                continue
            where = sort == "place" and re.search(rf"(?i)\b{WHERE} (?:the|an?|his|her|my) (?:[a-z]+ )?{noun}\b", self.begun)
            if rng.random() < 0.1 and self.foreign:
                other = made_up_noun(words, rng)
            elif sort == "place":
                other = rng.choice([place for preposition, place in self.grammar.wide_places
                                    if (not where or preposition == where[1].lower()) and place not in PARTS_OF_A_HOUSE] or [noun])
            else:
                other = rng.choice(words["animals" if sort == "animal" or singular(noun) in self.grammar.nouns.animals else "things"])
            other = plural(other) if sort == "many" else other
            known = other in GREAT or other in self.begun or other in others.values() or other == self.hero.kind
            if not known and " " not in other and other.islower() and not {other, singular(other)} & (UNTOLD | TAKEN):
                others[noun], self.sorts[other] = other, sort
        return others

    def is_replaceable(self, sort, noun):
        """Whether another noun of its SORT can stand for NOUN wherever the beginning says it: only what is listed, not a person, and nothing of which is
        said what others are not or do not."""
        nouns, words, begun = self.grammar.nouns, self.grammar.words, self.begun
        one = nouns.singular(noun)
        of_people = one in nouns.people or {one, noun} & PEOPLE
        if sort in ("person", "nature") or sort == "many" and of_people or noun in TAKEN or noun in nouns.doubtful or not re.fullmatch("[a-z]+", noun):
            return False                                        # the neighbors are tired, no shoelaces are
        listed = {"animal": one in words["animals"], "place": one not in words["vehicles"] and one not in PARTS_OF_A_HOUSE}
        if not listed.get(sort, one in words["things"] or one in words["animals"]):
            return False                                        # a hole, votes, an elevator
        kind = "animal" if sort == "many" and one in words["animals"] else sort
        if NO_OTHER.get(kind) and NO_OTHER[kind].search(begun) or any(each in begun for each in (f"'s {noun}", f"{noun} of ", f" of {noun}")):
            return False                                        # the doctor's office, a box of crayons
        said = begun.split()
        if any(word == noun and behind.strip('.,!?"') in nouns.forms for word, behind in zip(said, said[1:])):
            return False                                        # the market day
        if sort != "many" and any(match[1] == noun for match in NUMBERED.finditer(begun)):
            return False                                        # three goldfish
        if sort == "place":
            return not any(noun in match[1].split() for match in WAYS.finditer(begun))          # through the forest
        return sort != "thing" or not any(noun in match[1].split() for match in INSIDE.finditer(begun)) and all(        # nobody sleeps in a pebble
            ARTICLE.search(begun[:at]) for at in places_of(noun, begun)                         # flour is no kite
            if not (begun[:at][-1:].isalpha() or begun[at + len(noun):][:1].isalpha()))

    def exchanged(self, text, others):
        """TEXT with the nouns of OTHERS exchanged."""
        for noun, other in others.items():
            text = re.sub(rf"\b([Aa])n? ((?:[a-z-]+ )?){noun}\b", lambda match: an(f"{match[1]} {match[2]}{other}"), text)
            text = re.sub(rf"\b{noun}\b", other, text)
        return text

    def tell(self):
        """Make `text` of the beginning and `plot`: its start, a line for each that is named (for five at most), its turn, lines for three or four of
        these, one at most where it is to be brief, and its end."""
        rng, about, visit, self.lines_told = self.rng, self.to_be_told(), [], []
        if not about:
            others = [each for each in VISITORS if each not in self.plot.words and not re.search(rf"\b{each}", self.begun.lower())]
            self.cast["visitor"] = rng.choice(others)
            about, visit = [("animal", f"the {self.cast['visitor']}")], [self.grammar.expand_rule("visitor", self.cast, rng)]
        self.brief &= len(about) < 4
        about *= 2 if len(about) == 1 and not self.brief else 1
        lines = [(self.line(f"first {sort}", phrase, i), self.line(f"then {sort}", phrase, i)) for i, (sort, phrase) in enumerate(about)]
        living_first = sorted(rng.sample(range(len(lines)), len(lines)), key=lambda i: about[i][0] not in ("person", "animal"))
        again = sorted(living_first[:rng.choice([0, 0, 1] if self.brief else [3, 4])])
        gap = lambda: "\n\n" if rng.random() < 0.75 else " "
        firsts = visit + [first for first, _ in lines]
        if len(firsts) > 3:
            firsts[1] += "\n\n" + firsts.pop(2)
        begun = " ".join([self.begun + gap() + self.line("start"), *firsts])
        then = " ".join([self.line("turn"), *(lines[i][1] for i in again)])
        text = tidy(begun + "\n\n" + then + ("\n\n" if len(again) > 1 else gap()) + self.line("end"))
        self.text, first = (self.begun + self.agreeing(each.replace(KEPT, "")[len(self.begun):]) for each in (text, tidy(begun)))
        self.length, self.until_start = len(first), len(tidy(begun[:begun.index(firsts[0])]))
        self.text = self.text[:self.length] + self.calling_by_kind(self.text[self.length:])

    def to_be_told(self):
        """[(sort, phrase)] of those that get a line, five at most: not what the trouble is about, nor what is absent. The cast gets goal and wish."""
        singular, of_goal = self.grammar.nouns.singular, self.goal.split() if self.goal and self.trouble != "wish" else ()
        about = [(sort, phrase) for sort, phrase in self.named if singular(phrase.split()[-1]) not in map(singular, of_goal)][:5]
        rivals = self.rivals(about)
        self.absent = [phrase for _, phrase in about if phrase in rivals or is_said(self.begun, phrase.split()[-1], ABSENT)]
        about = [(sort, phrase) for sort, phrase in about if phrase not in self.absent]
        self.cast["goal"] = self.goal
        if self.trouble != "wish":
            return about
        forms = conjugate(self.goal, self.grammar.words["irregular verbs"])
        self.cast.update({"wish": forms[0], "wish.past": re.sub("^went (?=to |in )", "got ", forms[2]), "wish.ing": forms[3]})        # he arrives
        return self.beside_the_wish(about)

    def line(self, key, it="", nth=0):
        """A text of the plot's KEY, of the NTH third or half of all where it is of IT, so that the second noun is told of otherwise than the first; if
        possible one that has not been told."""
        self.cast["it"], lines, told = it, self.plot.lines[key], self.lines_told
        texts = lines[nth % (parts := 3 if len(lines) > 5 else 2)::parts] if it else lines
        if key == "start" and self.trouble in ("wish", "want") and re.search(r"\b(?:want|wish)", self.begun):            # that is not said twice
            texts = [text for text in texts if not WANTED.search(literal(text))] or texts
        if "event" in self.used and it == re.sub("^an? ", "the ", self.cast["event"]):       # it has no end to go to
            texts = [text for text in texts if not re.search(r"\b(?:end|half|side) of x|around x", literal(text))] or texts
        texts = [text for text in texts if text not in told] or [text for text in lines if text not in told] or texts
        told.append(self.rng.choice(texts))
        text = self.grammar.expand(told[-1], self.cast, self.rng)
        if key.endswith(" place"):
            where = self.in_it(it)
            text = re.sub(rf"\b([Ii])n {re.escape(it)}\b", lambda match: where[0].upper() + where[1:] if match[1] == "I" else where, text)
        return re.sub('^"?[a-z]', lambda match: match[0].upper(), text)

    def beside_the_wish(self, about):
        """[(sort, phrase)] of those in ABOUT that are not what is wished for; if there are none, of those that are there before the wish comes true."""
        in_it, yet_to_come = self.goal.split(), self.goal.startswith(YET_TO_COME)
        is_beside = lambda sort, last: last not in in_it or sort == "person" and not yet_to_come or sort in ("person", "animal") and self.comes_along(last)
        there = lambda phrase: re.search(rf"\b(?:an?|the|his|her) (?:[a-z]+ )?{re.escape(phrase.split()[-1])}\b", self.goal)
        return [(sort, phrase) for sort, phrase in about if is_beside(sort, phrase.split()[-1])] or [
            (sort, phrase) for sort, phrase in about if sort != "place" and not yet_to_come and there(phrase)]     # not in circles around a place

    def comes_along(self, noun):
        """Whether NOUN of the wish is there already: who is only named in a user's beginning may have to be found."""
        return False

    def rivals(self, about):
        """[phrase] of those in ABOUT, [(sort, phrase)], that is the other one of two who quarrel."""
        friend = self.cast.characters["friend"]
        if self.trouble != "quarrel":
            return []
        if self.hero is friend:                                 # with whom the beginning names first, then
            return [phrase for sort, phrase in about if sort in ("person", "animal")][:1]
        return [phrase for _, phrase in about if phrase == friend.name or phrase.split()[-1] == friend.kind.split()[-1]]

    def in_it(self, phrase):
        """A place, PHRASE, behind the preposition that it has where it is named, else in the word list: "by the pond", "on the bridge"."""
        noun, bare, places = phrase.split()[-1], re.sub("^(?:the|an?|his|her|my) ", "", phrase), self.grammar.words["places"]
        adjectives = "(?:(?!(?:of|and|to|from|with|for|in|at|on|under|by|near|behind) )[a-z]+ )*"
        said = re.search(rf"(?i)\b{WHERE} (?:the|an?|his|her|my) {adjectives}{re.escape(bare)}\b", self.begun)
        listed = next((preposition for preposition, place in places if place == bare), None) or next(
            (preposition for preposition, place in places if place.split()[-1] == noun), "in")
        return f"{said[1].lower() if said else listed} {phrase}"

    def calling_by_kind(self, text):
        """TEXT, the second half of the story, in which everybody who was met as "a shy fox named Pip" is once called "Pip the fox", or "the shy fox"; a
        child "the girl", where she is the only one."""
        wish = [an(self.cast[form]) for form in ("wish", "wish.past", "wish.ing")] if self.trouble == "wish" else []
        for one in self.cast.characters.values():
            wishes = [(place, place + len(form)) for form in wish for place in places_of(form, text)]
            met = one.name and one.name in self.begun and re.search(
                rf"\ban? ((?:[a-z-]+ )?){re.escape(one.kind)} (?:named|called) {re.escape(one.name)}\b", self.begun)
            places = met and [place for place in places_of(one.name, text) if not any(start <= place < end for start, end in wishes)
                              and text.count('"', place) % 2 == 0 and not re.match("['A-Za-z]| the ", text[place + len(one.name):])
                              and not text[:place][-1:].isalpha()]
            if not places or self.begun.count(f" {one.kind}") > 1:
                continue
            place, how = self.rng.choice(places), f"{self.cast['trait']} " if one is self.hero and "trait" in self.used else met[1]
            called = f"the {how}{one.kind}" if one.child or how and self.rng.random() < 0.5 else f"{one.name} the {one.kind}"
            behind = text[place + len(one.name):]
            said_by = text[:place].endswith(('!" ', '?" ')) and re.match(rf" {SAID}\b", behind)
            if re.search(r'(^|[.!?]"? |\n)$', text[:place]) and not said_by:
                called = called[0].upper() + called[1:]
            text = text[:place] + called + behind
        return text

    def agreeing(self, text):
        """TEXT of the plot with "were" for what is many, hero or goal, "my hat" for "his" where he says it, and told by "me" where that is the hero."""
        many = [self.cast["hero"]] * (self.hero.gender == "they")
        if self.goal and self.trouble != "wish" and self.sort(self.goal) == "many":
            many.append(self.goal)
        own = [phrase for phrase in [self.goal or "", *(phrase for _, phrase in self.named)] if phrase.startswith(self.cast["his"] + " ")]
        parts = text.split('"') if own else [text]
        who = rf"(?:{re.escape(self.cast['hero'])}|{self.cast['he']})\b"
        speaker = own and re.compile(rf" ?(?:{SAID} {who}|{who}(?: [a-z]+ly)? {SAID})")
        for i in range(1, len(parts) - 1, 2):                   # what is said, with who says it behind it, or before where he goes on
            goes_on = i > 1 and speaker.match(parts[i - 1]) and not (
                re.search(r"[.!?]\s+\S", parts[i - 1]) or re.match(rf" ?{SAID}", parts[i + 1]))
            if speaker.match(parts[i + 1]) or goes_on:
                for phrase in own:
                    parts[i] = re.sub(rf"\b{re.escape(phrase)}\b", f"my {phrase.split(' ', 1)[1]}", parts[i])
            else:                                               # somebody else: to him, mostly
                for phrase in own:
                    parts[i] = re.sub(rf"\b{re.escape(phrase)}\b(?! own)", f"the {phrase.split(' ', 1)[1]}", parts[i])
        text = '"'.join(parts)
        for name in many:
            text = re.sub(rf"\bwas (?={re.escape(name)}\b)", "were ", re.sub(rf"\b((?i:they|{re.escape(name)})) was\b", r"\1 were", text))
        return as_told_by_me(text) if self.hero.gender == "I" else text


# 8. Stories of premises, which are asked for by what is in them

# Whom a premise says to have no friend; and what nobody is called in a trouble.
LONELY = re.compile(r"(?i)\bnobody|\bno friends|\balone\b|\blonely\b|\bknew (?:no|nobody)\b")
CONTRARY = {"afraid": "brave bold fearless daring courageous confident adventurous reckless".split(), "low": "cheerful happy merry jolly".split(),
            "sorry": "honest truthful well-behaved obedient kind kind-hearted good-hearted caring fair loyal trustworthy".split(),
            "weather": "patient easygoing".split()}

# What is no wish to come true.
BAD_DEEDS = re.compile(r"(?:tell lies|lie|cheat|boast|steal|frighten|bully|quarrel|complain|interrupt|brag|tease|spy|give up|run away|"
                       r"throw a tantrum)\b(?! (?:down|in|on|under))")

# What a request may say that somebody does already, who has yet to learn it.
DOES_ALREADY = re.compile(r"(?i)\b(?:who|that|and|he|she) (?:can|loves?|likes?|enjoys|is good at|gets? better at|is busy|is proud of|never stops|"
                          r"spends) (?!for a)")

# ... and all else that requests say and no premise tells.
UNTRUE = re.compile("|".join((DOES_ALREADY.pattern,
    r"\bit can\b(?! be\b)", r"\b(?:is|was) a little [a-z-]+(?:$|[.!?])", "no idea of", "was never", "no longer", "became afraid", "not .* anymore",
    "(?:never|sometimes) [a-z-]+(?:$|[.!?]| (?:in|at|on|near|and|with) )",
    "nobody wants to play", "who changes", "called .* by everyone", "tired of being", "is teased", "stops being",                            # the trait
    "(?:works?|work|job|hired) as", r"\b(?:first|last|worst) day of", "a day in the life",                                                   # at work
    r"\b(?:retired|famous|clumsy|the best|the worst|very old) (?=.* (?:at|in|on)\b)", "always (?:has|carries)", "never goes anywhere", "class trip",
    r"\b(?:like|love|loves|likes|crazy about) (?:little )?(?:boys|girls|women|men|kings|queens)",                                            # odd to say
    "tell me that one", r"\b(?:with|of|for|have) (?:how|when|the day|being)\b", r"\bmy (?:favorite|old|new) (?!animal)",
    r"\bneighbors?\b", r"\bclassmates?\b", r"there is (?:how|when|the day)\b", r"^no (?!.* who)", "eats too much", "only eats", "eats nothing but",
    "cannot stop eating", r"\bchanges\b(?! places| into)",
    r"\bthere is [a-z]+ing\b", r"\bdo (?:how|when|why|the day)\b", r"\bmy class of\b", r"\bthe (?:story|tale) when\b")))

# What a request may say that a thing, a friend or food is.
DESCRIBED = re.compile(r"\b(new|strange|tiny|huge|old|golden|little|big|small|happy|funny|magic|best|much|pot of|plate of|bowl of|more|mountain of)")

# Words by which a story is asked to be short, or long.
SHORT = re.compile(r"(?i)\b(?:short|brief|quick|not too long|few (?:lines|sentences)|paragraph)\b")
VERY_SHORT = re.compile(r"(?i)\b(?:very short|few (?:lines|sentences)|paragraph|quick)\b")
LONG = re.compile(r"(?i)\blong(?: bedtime)? (?:story|tale|one)|\btake your time|\bmake it long|\bcan be long")


class PremiseStory(Story):
    """A plot told behind a Premise, `premise`, which is told with all that is `used` of it, slots, of which those in `background` have no
    part in what happens, and `needs` may be asked for; `extra` [(slot, cast)] of a second thing or friend; `invented` the noun in it that was made up,
    or None; `own_words` of the premise, of which nothing is told; `known` the hero, if he is of an earlier story, or None; `wanted` whether somebody
    wrote it or asked for it, `asked` his request, `told` [(slot, cast)] of what that names, and `topic` what it is about, in the story's order."""

    def __init__(self, grammar, rng, premise, asked, known=None, begun=False):
        """Go on from PREMISE. ASKED: with members that have no part in it, and made-up nouns, which the request then names. KNOWN: it is about this
        Character. BEGUN: so that a user may have written it as a beginning, with such members as well. Raises ValueError where what was drawn cannot be
        told, or asked for truly."""
        self.known, self.wanted = known, asked or begun
        super().__init__(grammar, rng, premise, asked=not begun)
        self.asked = self.topic = None
        for _ in range(20 if asked else 0):
            wording, self.topic = premise_request(self)
            self.asked = of_its_length(wording, self)
            if self.is_true(self.asked.lower()) and not re.search(r"\b(an? [a-z-]+)\b.*\b\1\b", self.topic or ""):        # a girl and a girl
                self.asked = sloppy(self.asked, rng)
                return
        if asked:
            raise ValueError(f"never asked for in words that are true: {self.asked}")

    def is_true(self, asked):
        """Whether the request ASKED, in small letters, asks for what is told, and for a story as long as it is."""
        untrue = UNTRUE.search(asked) or DOES_ALREADY.search(self.topic or "") or self.misnames(asked) or self.mistells(asked)
        return not untrue and self.names_enough(asked) and self.is_as_long(asked)

    def names_enough(self, asked):
        """Whether ASKED names, where it names anybody or anything that has no part in what happens, one that has; and what the hero is, if he is neither a
        child nor an animal nor grown up, or named alone: nobody expects a thunderstorm to go for a walk, or Omar to be a sock."""
        hero, words, core = self.hero, self.grammar.words, self.used - {"hero", "clause", *self.background}
        names = [name for slot in core for name in (self.cast.verbs if slot == "deed" else self.cast.names(slot)) if name]
        small = {"the", "his", "her", "their", "and", "with", "for", "into", "from"}
        in_it = lambda names: any(re.search(rf"\b{re.escape(word[:4])}", asked) for name in names for word in name.lower().split()
                                  if len(word) > 2 and word not in small)
        named = hero.name and re.search(rf"\b{re.escape(hero.name.lower())}\b", asked)
        usual = hero.child or not named and any(hero.kind in words[kinds] for kinds in ("animals", "he people", "she people"))
        friend, known = self.cast.characters["friend"], in_it([hero.kind])
        alone = "friend" in self.used and in_it([friend.kind, friend.name or ""]) and not (known or named)  # who is asked for is the hero, then
        return (not (self.background or self.extra) or not names or in_it(names)) and (usual or known) and not alone

    def misnames(self, asked):
        """Whether ASKED names somebody or something otherwise than the beginning does: without the noun that is made up, "the fox" by his name though
        it has not said that he is one, a thing or friend as new or strange, a place as near, or friends where nobody is called so."""
        cast, begun = self.cast, self.begun.lower()
        hero = cast.characters["hero"]
        kind, thing, friend = (re.escape(word.lower()) for word in (hero.kind, cast.thing.split()[-1], cast.characters["friend"].kind))
        by_name = re.search(r"\bcall(?:ed)?\b|name is|name of|'s name", asked) and re.search(rf"\bthe {kind}\b", asked)
        described = DESCRIBED.search(asked) and re.search(rf"{DESCRIBED.pattern} (?:[a-z-]+ )?(?:{thing}|{friend}|{re.escape(cast['food'])})\b", asked)
        near = any(f"near {article} {cast.place[1]}" in asked for article in ("the", "a", "an"))
        return any((self.invented and self.invented not in asked, by_name and len(re.findall(rf"\b{kind}", asked)) < 2,
                    described and not re.search(rf"\b{described[1]}\b", begun), "place" in self.used and near and cast.place[0] != "near",
                    re.search(rf"\blittle {kind}", asked) and "little" not in begun,
                    "friend" not in begun and re.search(r"(?<!my )\b(?:friends?|pals)\b", asked), "friend" not in self.used and "they are " in asked,
                    re.search(r"\b(?:his|her|their|its) (?:best )?friend is\b", asked) and not re.search(rf"\b{kind}|\b{(hero.name or '-').lower()}\b", asked)))

    def mistells(self, asked):
        """Whether ASKED says that something happens which does not: the deed to the friend besides, a meeting, a journey, help of another sort, that food
        is made, that somebody has what he only wants; or does not say that he does not like what he does not."""
        cast, about, begun = self.cast, set(self.premise.about), self.begun.lower()
        thing, food = re.escape(cast.thing.split()[-1].lower()), re.escape(cast["food"])
        refuses = "(?:d|does|do|will|wo|ould)(?:n't| not)|no |hate|refuse|stand|ha[sd] to"
        helps = r"\b(?:save|rescue)[sd]?\b" if self.trouble == "sad" else r"comfort|cheer|heal|look(?:s|ed) after|is kind|is sad"
        return any(("deed" in self.used and re.search(rf"{re.escape(cast.verbs[3])} and an? ", asked),
                    "meet" not in about and re.search(r"\b(?:meets?|met|(?:makes?|becomes?|became|came to be) friends|got to know)\b", asked),
                    re.search(r"\bheal", asked) and not re.search(r"feel well|\bhurt\b|\bill\b", begun),
                    re.search(r"\ba night (?:in|at|on) ", asked) and not re.search(r"\bnight", begun),
                    "friend" in self.background and re.search(r" who (?:both )?(?:carry|bring|take|build|make|want|learn|try|built|made|brought|took|wanted|"
                                                              r"learned|tried)\b", asked),
                    self.premise.name == "deed with a thing" and not re.search(rf"\b{thing}", asked), "go" not in about and "journey" in asked,
                    "help" in about and re.search(helps, asked), self.trouble == "weather" and re.search(r"\b(?:liked?|loved?|enjoyed)\b", asked),
                    "night" in about and re.search("not want to sleep|not go to bed", asked) and "want to sleep" not in begun,
                    "food" in self.used and re.search(rf"(?:making|makes?|looking for) {food}", asked) and not re.search("make|made", begun),
                    "food" in self.used and re.search(rf"eating {food}", asked) and not re.search(r"\b(?:eat\w*|ate)\b", begun),
                    "thing" in self.used and re.search(rf"\b(?:has|owns|takes care of|is proud of|have|use) an? (?:[a-z-]+ )?{thing}\b", asked)
                    and not re.search(rf"\b(?:had|has|have|his|her|their) (?:(?!no )[a-z-]+ )*{thing}", begun),
                    {"refuse", "refusefood"} & about and ("could not wait" in asked or not re.search(refuses, asked))))

    def draw(self, premise, named):
        """A text of PREMISE behind how its hero is met and up to three sentences on what else is asked for, with its alternatives drawn; makes the cast."""
        core = settled(self.grammar, self.rng.choice(premise.begin), self.rng)
        self.draw_cast(premise, core)
        self.draw_members(premise, core)
        met = "premise pair" if "pair" in self.cast else "premise clause" if "clause" in self.cast else "premise hero"
        told = [slot for slot in self.background if not (slot == "friend" and "pair" in self.cast)]
        text = [Rule(met)]
        for slot in sorted(told, key=IN_ORDER.index):
            text += [" ", Rule(f"there {slot}")]
        for slot, other in self.extra:
            text += [" ", self.grammar.expand_rule(f"there second {slot}", other, self.rng)]
        text = settled(self.grammar, Sequence([*text, " ", *self.naming_him(core, "friend" in told)]), self.rng)
        if "pair" in self.cast:
            names = {"he": [Slot("hero")], "him": [Slot("hero")], "his": [Slot("hero"), "'s"]}                # not "she" of two
            text = Sequence(each for piece in text for each in (names.get(piece, [piece]) if isinstance(piece, Slot) else [piece]))
        self.own_words = {word for piece in text if not isinstance(piece, Slot) for word in re.findall("[a-z]+", piece.lower())}
        return text

    def draw_cast(self, premise, core):
        """A cast for the premise's text CORE, now and then with a hero as users describe him, and a deed that is said of somebody elsewhere."""
        words, rng = self.grammar.words, self.rng
        self.cast = Cast(self.grammar, rng, draw_characters(words, rng, premise.lists, self.known), premise.lists)
        for one in (each for each in self.cast.characters.values() if each is not self.known):
            last, other = one.kind.split()[-1], "she" if one.gender == "he" else "he"
            if last in words[f"{other} people"] and last not in words[f"{one.gender} people"]:
                raise ValueError(f"a {one.kind} is nobody to be called {PRONOUNS[one.gender]['him']}")
        hero = self.cast.characters["hero"]
        if not self.known and hero.adjective in CONTRARY.get(premise.trouble, ()):
            hero.adjective = ""
        if not (self.known or hero.child or " " in hero.kind) and rng.random() < 0.2:
            hero.adjective = rng.choice([trait for trait in words["traits"] if not self.is_out_of_place(trait, premise.trouble)])
        elif not self.known and rng.random() < 0.4:
            hero.adjective = ""                                 # there is more to hear of without
        if rng.random() < 0.5:
            self.cast.adjective = ""
        if rng.random() < 0.12:
            self.cast.place = ("near", self.cast.place[1])
        if self.cast.characters["friend"].owner and premise.trouble in ("guest", "afraid"):
            raise ValueError("nobody meets his own family")
        if "deed" in roots(core) and rng.random() < 0.25:
            self.wish_for_a_clause()
        if "deed" in roots(core) and BAD_DEEDS.match(self.cast.verbs[0]):
            raise ValueError(f"nobody should want to {self.cast.verbs[0]}")
        if {"deed", "friend"} <= roots(core) and " with " in self.cast.verbs[0]:
            raise ValueError(f"nobody does that with two: {self.cast.verbs[0]}")
        made = "food" in roots(core) and re.search(r"\b(?:make|made|making|cook|cooked)\b", literal(core))
        if made and self.cast["food"] in words["foods that nobody makes"]:
            raise ValueError(f"nobody makes {self.cast['food']}")
        if "thing" in roots(core) and self.cast.thing.startswith("pair of"):
            raise ValueError(f"one or two? {self.cast.thing}")

    def draw_members(self, premise, core):
        """Who and what there is beside those of the premise's text CORE, all to be asked for: makes used, background, extra, must and invented."""
        rng, cast = self.rng, self.cast
        self.used, self.extra, self.background = roots(core) - PRONOUNS["he"].keys() | {"hero"}, [], []
        for slot in rng.choices(list(BACKGROUND), BACKGROUND.values(), k=rng.choices(range(4), (35, 35, 22, 8))[0] if self.wanted else 0):
            first = slot.removeprefix("second ")
            if first != slot and first in self.used and not self.extra:
                self.extra = [(first, cast.other({first}))]
            elif first == slot and slot not in self.used and not (
                    slot == "friend" and LONELY.search(literal(core)) or slot == "trait" and self.is_out_of_place(cast["trait"], premise.trouble)):
                self.used.add(slot)
                self.background.append(slot)
        self.must = [(slot, cast) for slot in (*self.background, *sorted(self.used & set(SPECIAL) - set(self.background)))]
        hero, friend = cast.characters["hero"], cast.characters["friend"]
        if self.background and "friend" in self.used and "trait" not in self.used and not self.known and "meet" not in premise.about and (
                not hero.child or hero.gender == friend.gender) and rng.random() < 0.15:
            cast.pair()
        elif self.wanted and premise.trouble in GOALLESS and not {"trait", "event"} & self.used and rng.random() < 0.12:
            self.clause_of_hero()
        self.invented = self.invent(self.used, "thing" in premise.lists) if self.wanted and rng.random() < 0.3 else None
        if "trait" in self.used:
            cast.characters["hero"].adjective = ""
        if "event" in self.background:
            cast["event"] = rng.choice(self.grammar.words["gatherings"])
        self.premise, self.needs = premise, sorted(self.used & {*MEMBERS, *SPECIAL})

    def is_out_of_place(self, trait, trouble):
        """Whether TRAIT is one that the TROUBLE denies, or a bad one, which would have to be the trouble itself."""
        return trait in CONTRARY.get(trouble, ()) or trait in self.grammar.premises["bad trait"].lists["trait"]

    def tell(self):
        """As any plot, with a last word on its premise where there is a rule for one; it is told to the friend who was wronged, not to "the one who
        should hear it"."""
        super().tell()
        if f"last {self.premise.name}" in self.grammar.rules:
            self.text += " " + tidy(self.grammar.expand_rule(f"last {self.premise.name}", self.cast, self.rng))
        friend = str(self.cast.characters["friend"])
        if self.trouble == "sorry" and "friend" in self.used and not {"friend", "pair"} & {*self.background, *self.cast}:
            heard = re.sub(r"\bthe one who should hear it\b", friend, self.text[self.length:])
            self.text = self.text[:self.length] + re.sub(r"\bThe one who should hear it\b", friend[0].upper() + friend[1:], heard)

    def comes_along(self, noun):
        return re.search(rf"\b(?:with|for) (?:[a-z-]+ )*{re.escape(noun)}$", self.goal) is not None

    def naming_him(self, core, other):
        """CORE with {hero} for its first {he}, where there is an OTHER who could be meant, and now and then else; of a pair with names alone."""
        first = next((i for i, piece in enumerate(core) if piece == "he" and isinstance(piece, Slot)), None)
        if first is not None and (other or self.extra or self.rng.random() < 0.15):
            core = Sequence([*core[:first], Slot("hero"), *core[first + 1:]])
        return Sequence([Slot("friend") if piece == "a friend" and "pair" in self.cast else piece for piece in core])

    def clause_of_hero(self):
        """Say of the hero what a user may say that he is: "who had two mothers", asked for as "who has two mothers"."""
        clause = self.clause()
        if match := re.fullmatch(r"who (?!had to|.*\b(?:flu|ill|sick|would not|could not|never|lost|afraid|wanted|wished|forgot|missed|blamed|until|no)\b)"
                                 r"((?:had|was|could|lived|collected|always|often|snored|walked) .+)", clause):
            now = as_of_now("he " + match[1], self.grammar.words["irregular verbs"])[3:]
            self.cast["clause"], self.cast["past clause"] = self.rng.choice([f"who {now}", f"who {now}", clause]), clause
            self.must.append(("clause", self.cast))

    def wish_for_a_clause(self):
        """Make what may be said of the hero, "who built a raft out of pencils", the deed: "build a raft out of pencils"."""
        irregular = self.grammar.words["irregular verbs"]
        match = re.fullmatch(r"who ([a-z]+) ([a-z ]+)", self.clause())
        if match and match[1] not in AUXILIARIES | BETWEEN and not re.search(r"\b(?:and|but|because|when|to|was|were)\b", match[2]) and (
                base := base_of(match[1], irregular)):
            self.cast.verbs = conjugate(f"{base} {match[2]}", irregular)

    def invent(self, used, has_list):
        """Make up a noun for one of the slots USED, but not for the thing where the premise HAS_LIST of things; returns it, None where nothing was."""
        among = [*([] if has_list else ["thing", "thing"]), "place", "deed", *([] if "pair" in self.cast else ["hero", "friend"])]
        slots = [slot for slot in among if slot in used]
        if not slots:
            return None
        before = {slot: self.cast.names(slot)[0] for slot in slots}
        self.cast.invent(slots)
        return next((self.cast.names(slot)[0] for slot in slots if self.cast.names(slot)[0] != before[slot]), None)

    def told_trouble(self, premise):
        """(trouble, goal) as PREMISE says; who is afraid of dogs is so of the dogs that come."""
        goal = premise.goal and self.grammar.expand(premise.goal, self.cast, self.rng)
        if goal and premise.trouble != "wish":
            goal = goal.replace(self.cast["thing"], self.cast.thing)            # "the red kite" is the kite from now on
        if premise.trouble == "afraid" and re.fullmatch(r"(?!.*ing\b|the |an? |every)[a-z -]+", goal):
            goal = f"the {goal}"
        if premise.trouble == "wish" and re.search(r"\b(?:wait|all night|all day|years?|summer|without help)\b|^(?:win|buy|carry) an? (?!.*with)", goal) and (
                self.cast["deed"] in goal):
            raise ValueError(f"nobody can learn to {goal}")
        return premise.trouble, goal

    def all_named(self):
        """[(sort, phrase)] of its slots, and of nouns in what is done or said of the hero; six of them, in their order."""
        named, hidden = {}, self.own_words | set(self.cast["job"].split() if "job" in self.used else ()) | set(self.cast.get("pair", "").split())
        for slot, cast in [(slot, self.cast) for slot in sorted(self.used)] + self.extra:
            if slot == self.premise.only_told and cast is self.cast or (
                    slot == "event" and "event" not in self.background and "event" not in self.premise.lists):
                hidden |= set(cast[slot].lower().split())               # nobody can be shown around what is to come
            elif slot in ("thing", "place", "nature", "food", "event"):
                phrase = self.with_the(slot, cast)
                sort = {"place": "place", "event": "place", "thing": "thing", "food": "thing"}.get(slot) or self.sort(phrase)
                if slot == "nature" and (slot in self.background or sort not in ("many", "place")):
                    sort = "nature"
                named[phrase] = sort
            elif slot == "friend" and not cast.characters["friend"].name:
                named[str(cast.characters["friend"])] = "animal" if (
                    cast.characters["friend"].kind in self.grammar.words["animals"] and self.premise.trouble != "sorry") else "person"
            elif slot == "friend" and cast is not self.cast:
                named[cast.characters["friend"].name] = "person"
        hidden |= {word for phrase in named for word in phrase.lower().split()}
        for sort, phrase in super().all_named():
            if phrase.lower().split()[-1] not in hidden:
                named[phrase] = sort
        self.sorts.update((self.grammar.nouns.parted(head(phrase))[2].lower(), sort) for phrase, sort in named.items() if sort != "person")
        return [(sort, phrase) for phrase, sort in sorted(named.items(), key=lambda one: self.at(one[0]))][:6]

    def with_the(self, slot, cast):
        """SLOT of CAST as the story names it from now on: "the rain", "the fair", "the kite"."""
        if slot in ("nature", "event"):                         # not "the Mondays"
            return re.sub("^(?:an? |(?!the |[A-Z]|.*ing$))", "the ", cast[slot])
        return f"the {cast.names(slot)[0] if slot == 'thing' else cast[slot]}"

    def draw_others(self):
        return {}

    def to_be_kept_apart(self):
        return self.cast.said(sorted(self.used - {"clause"})) + [word for slot, cast in self.extra for word in cast.said([slot])]

    def in_it(self, phrase):
        if "event" in self.used and phrase.split()[-1] == self.cast["event"].split()[-1]:
            return f"at {phrase}"
        return super().in_it(phrase)

    def matters(self, slot):
        """Whether the story names what SLOT stands for more than once, and in its second half, too, so that a request may ask for it."""
        if slot in SPECIAL or slot in PRONOUNS["he"] or slot == "pair":
            return True
        names = [name for name in self.cast.names(slot) if name]
        return sum(map(self.text.count, names)) > 1 and any(name in self.text[len(self.text) // 2:] for name in names)

    def to_be_asked(self):
        return [slot for slot in ("friend", "place", "thing", *SPECIAL)
                if slot in self.used and (slot != "place" or self.cast["at place"] in self.begun.lower())]


# 9. Requests for a story, and questions about it

# "in which when", of what happens when something else does.
TWO_CLAUSES = re.compile(r"(?i)\b(?:where|in which|when|what if|suppose|imagine that)[ :]+(?:when|after|as soon|before|while|once)\b")

# What a request leaves out before a sentence that it retells, and sentences in which nothing happens or it is not clear to whom.
LEFT_OUT = re.compile(r"^(?:One|Every|Early|Late|Last|Once|Today|Yesterday|Then|But|And|So|Now)\b(?: [^, ]+){0,4}, |^(?:Then|But|And|So|Now) ")
NO_EVENT = re.compile(r"(?:Once|Out|Up|Down|Bang|He|She|It|They)\b|There (?:once was|was once|was) an? [^.,]* (?:named|called) \w+\.|There s\w*|.*[?\"]")

# Behind one of these "and a lantern" would be something else: "a fox who sings", "to make it rain".
CLAUSE = re.compile(r"\b(who|that|whose|which|how|why|when|where|whether|if)\b|\bto (?!the |an? )[a-z]+\b|\b(?:for|of|from) an? [a-z]+$")

# What people type in haste, and before and behind what they want, that is none of it.
HASTE = {"please": ["pls", "plz", "pleeease", "plss"], "about": ["abt", "bout"], "you": ["u", "ya"], "want a(?= (?:[a-z]+ )?(?:story|tale))": ["wanna hear a"],
         "story": ["storey", "stroy", "story"], "can't": ["cant"], "don't": ["dont"], "doesn't": ["doesnt"], "I": ["i"], "and": ["&", "n", "and"],
         "for": ["4", "for"],
         "tell": ["tel", "tell"]}                               # some now and then as they should be
BEFORE_A_REQUEST = ["hey ", "yo ", "um, ", "so ", "hi, ", "hello there, ", "ok now: ", "hey bot, ", "one more thing: ", "umm ", "next: ", "and now ",
                    "oh oh oh, "]
BEHIND_A_REQUEST = [" pls", " plz", " please", " thx", " thanks", " ty", " :)", "!!", "!!!", " ok?", " now", ", go", " thank you", "...", " pretty please",
                    " cheers", " ok thanks bye", " i'm bored", " lol", " asap"]


def premise_request(story):
    """(what a user says to get STORY, a PremiseStory; its topic): by what is in it, by what its trouble teaches, or just any story, with topic None."""
    grammar, cast, rng, trouble = story.grammar, story.cast, story.rng, story.trouble
    kind, story.told = rng.random(), []
    if not (story.must or story.extra or story.invented) and kind < 0.26:
        topic = grammar.expand_rule(f"theme {trouble}", cast, rng) if kind < 0.2 and f"theme {trouble}" in grammar.rules else None
        asked = ask(story, topic)[0] if topic else grammar.expand(rng.choice(grammar.talk.remarks["any>"]), cast, rng)
        return informal(tidy(asked), rng), topic
    asked, topic = request(story)
    preposition, place = cast.place
    if topic.split()[0] in [one.kind.split()[0] for one in (story.hero, cast.characters["friend"])]:
        topic = an(f"a {topic}")                                # "fox stuck in a jar"
    return asked, topic if "near" in asked.lower() else re.sub(rf"\bnear (?=the {re.escape(place)}\b)", preposition + " ", topic)


def of_its_length(asked, story):
    """The request ASKED, and that the story is to be short where STORY is brief; now and then that it is to be long, where it is."""
    rng, words = story.rng, story.number_of_words
    if SHORT.search(asked) or LONG.search(asked) or not story.brief and (words < 370 or rng.random() > 0.05):
        return asked
    length, very = "short" if story.brief else "long", "" if 190 < words < 430 else "very "
    what = (r"\b([Aa]) ((?:bedtime |nice |new |funny |little |sweet |good |children's )?(?:story|tale))\b(?! (?:machine|bot|time|soup|dice|idea|request|"
            r"feature))")
    worded = re.sub(what, rf"\1 {rng.choice(['', very])}{length} \2", asked, count=1)
    if worded != asked and rng.random() < 0.7:
        return worded
    rule = f"also {very}{length}" if very and rng.random() < 0.5 and story.brief else f"also {length}"
    more = story.grammar.expand_rule(rule, story.cast, rng)
    return asked + (" " if asked[-1] in ".?!:" else ". ") + (more.lower() if asked.islower() else more)


def plot_request(story):
    """What a user says to get STORY, a Story of a situation: what happens there."""
    cast, rng = story.cast, story.rng
    for _ in range(30):                                         # bounded, as the hero may be "a quick fox"
        if story.deeds:
            asked, _ = ask(story, f"{story.hero.asked_for(rng, story.text)} {rng.choice(['who', 'who', 'who', 'that'])} {story.deeds}")
        else:
            cast["happening"] = story.happening
            asked = story.grammar.expand_rule("ask happening", cast, rng)
        if story.is_as_long(asked.replace(story.deeds or story.happening, "")) and not TWO_CLAUSES.search(asked):
            break
    return of_its_length(informal(tidy(asked), rng), story)


def deeds_of(story):
    """[(what the beginning of STORY says of its hero, as of now, the sentence), ...], of one sentence or two in a row: "loses her hat"; [] where it
    does not begin with him."""
    hero, done = story.hero, []
    kind = rf"(?:[a-z-]+ )?{re.escape(hero.kind)}"
    who = re.compile("(?:" + "|".join(filter(None, [rf"An? {kind}(?: (?:named|called) {re.escape(hero.name or '-')})?", f"The {kind}",
                     hero.name and rf"{re.escape(hero.name)}(?: the {kind})?", story.cast["he"].capitalize()])) + ") (.+)[.!]")
    for sentence in whole_sentences(story.begun)[:4]:
        said = LEFT_OUT.sub("", sentence)
        match = who.fullmatch(said[0].upper() + said[1:])
        if re.match("(Once|There|This is)", sentence) and not match and not done:
            continue                                            # "Once there was a fox named Pip."
        if not match or '"' in sentence or re.match(
                rf"(?:and|in|on|at|under|behind|by|near|from|with|of|named|called) |(?:was|is) an? (?:[a-z-]+ )*{kind}$", match[1]):
            break
        others = [one for one in story.cast.characters.values() if one is not hero and one.gender == hero.gender]
        if done and said.split()[0].lower() == story.cast["he"] and any((one.name or one.kind) in story.begun for one in others):
            break                                               # "he" may be the other one
        done.append((as_of_now("he " + match[1], story.grammar.words["irregular verbs"])[3:], sentence))
    both = len(" and ".join(now for now, _ in done[:2]).split()) < 17 and story.rng.random() < 0.5
    return done[:2] if both else done[:1]


def happening_of(story):
    """(a sentence of the beginning of STORY as of now, without its full stop, the sentence): "all the lights in the school go out"; None where all
    is said by somebody, or of nobody that it names."""
    told = [sentence for sentence in whole_sentences(story.begun) if not NO_EVENT.match(sentence)]
    whose = lambda sentence: re.search(r"(?i)\b(?:he|she|him|her|his|they|their)\b", sentence) is not None
    who = story.hero.name or story.hero.kind
    told = [sentence for sentence in told if who in sentence] or [sentence for sentence in told if not whose(sentence)]
    if not told:
        return None
    text = as_of_now(re.sub(r"^(?:But|Then|And|So|Now|Today,?|One day,?) ", "", told[0].rstrip(".!?")), story.grammar.words["irregular verbs"])
    named = {word for name in (story.hero.name or "", *(one.name or "" for one in story.cast.characters.values())) for word in name.split()}
    small = not (re.match("[A-Za-z]*", text)[0] in named or text.split()[0].lower() in CALLED_BY_ROLE)
    return text[0].lower() + text[1:] if small else text, told[0]


def request(story):
    """(what a user says to get STORY, a PremiseStory, its topic): by words, or by a phrase for what it is about and all else that must be named because
    it is in the story for this alone. The topic is "a fox who lost his hat"."""
    grammar, cast, rng = story.grammar, story.cast, story.rng
    casts = [cast] + [each for _, each in story.extra]
    for each in casts:
        each.asking, each.asked = story.text, {}                # slots are now worded as a user would
    try:
        if rng.random() < 0.22 and not {"clause", "pair"} & cast.keys():
            return by_words(story)
        phrase = topic_of(story)
        story.told = [(slot, cast) for slot in sorted(roots(phrase) - PRONOUNS["he"].keys()) if slot != "deed" or (slot, cast) in story.must]
        extra = [one for one in story.must + story.extra if one not in story.told]
        extra += [(slot, cast) for slot in ("friend", "place", "thing") if slot in story.needs and rng.random() < 0.3
                  and story.matters(slot) and (slot, cast) not in story.told + extra]
        extra = [one for one in extra if "pair" not in cast or one != ("friend", cast)]
        story.told += extra
        phrase = grammar.expand(phrase, cast, rng)
        of_hero = phrase.startswith(cast.asked.get("hero", "\n")) and re.match(r"(?:(?! and |,).)+ who (?!was )\w+s ", phrase)
        if ("deed", cast) in extra and rng.random() < 0.7 and of_hero:
            phrase += " " + grammar.expand_rule("and deed", cast, rng)
            extra.remove(("deed", cast))
        topic, more = attach(phrase, rng.sample(extra, len(extra)), grammar, rng)
        echo = in_order(story, phrase, extra)
        hero, friend = cast.characters["hero"], cast.characters["friend"]
        if hero.name and str(hero) not in topic and rng.random() < 0.25 and story.matters("hero") and hero.kind != friend.kind:
            more.append(grammar.expand_rule("also name", cast, rng))
            echo = re.sub(rf"\b((?:an?|the) (?:[a-z-]+ )?{re.escape(hero.kind)})\b", rf"\1 named {hero.name}", echo, count=1)
        asked, names_hero = ask(story, topic)
        if names_hero:
            echo = re.sub(rf"\ba (little )?{hero.kind}( (named|called) {hero.name})?\b", hero.name, echo, count=1)
        if more and asked[-1] not in ".?!:":
            asked += "."
        return informal(tidy(" ".join([asked, *more])), rng), echo
    finally:
        for each in casts:
            each.asking = None


def attach(topic, extra, grammar, rng):
    """(TOPIC with some of EXTRA, [(slot, cast)], "with a lantern"; sentences on the others). Behind a clause only a place can follow: "a
    fox who sings and a lantern" would be something else."""
    more = []
    clause, used = CLAUSE.search(topic), set()
    for slot, cast in extra:
        whose = slot in ("trait", "deed", "fear")               # "a trip who is afraid": it must follow the hero
        if (f"with {slot}" in grammar.rules and slot not in used and (slot == "place" or not clause)
                and (not whose or not used and topic == cast.asked.get("hero")) and rng.random() < 0.7):
            used.add(slot)
            topic += " " + grammar.expand_rule(f"with {slot}", cast, rng)
        else:
            more.append(grammar.expand_rule(f"also {slot}", cast, rng))
    return topic, more


def in_order(story, topic, members, bare=False):
    """TOPIC (may be "") and MEMBERS [(slot, cast)] by their parts in STORY, whatever the order in which a user named them: "a fox, with a
    lantern, in the garden, and of a kite". So the story's first sentence settles who is the hero and who is there besides. BARE: by kinds
    alone."""
    cast = story.cast
    clause = re.search(r"\b(who|that|how|why)\b", topic) or topic not in ("", cast.asked.get("hero"))
    if bare and ("trait", cast) in members:                     # "a proud goat"
        topic = an(f"a {cast['trait']} {cast.characters['hero'].kind}")
        members = [member for member in members if member not in (("trait", cast), ("hero", cast))]
    part = {"hero": "", "friend": ", with " if clause else " and ",
            **({"place": ", ", "thing": ", and of "} if CLAUSE.search(topic) else {"thing": ", with ", "place": ", "})}
    own, joined = [(slot, cast) for slot in part if (slot, cast) in members and slot in ("hero", *story.needs)], "\n"
    for slot, each in own + [member for member in members if member not in own]:
        name = f"echo {slot}"
        if slot == "nature" and (match := re.search(rf"\ban? {re.escape(each[slot])}\b", story.begun)):
            text = match[0]
        elif bare and slot == "job":
            text = an(f"a {each[slot]}")
        elif name not in story.grammar.rules or bare and slot in ("hero", "friend", "thing"):
            text = "a " * (slot in ("thing", *each.characters)) + each.names(slot)[0]
        elif slot == "place" and ((slot, each) not in own or not topic):
            text = f"the {each.names(slot)[0]}"
        else:
            text = story.grammar.expand_rule(name, each, story.rng)
        joint = part[slot] if (slot, each) in own else ", and of "
        if slot == "thing" and topic.endswith(joined):
            joint = " and "                                     # not "with a goat, with a kite"
        joined = text if joint == ", with " else "\n"
        topic += joint * bool(topic) + text
    return topic


def topic_of(story):
    """A parsed phrase for what a request is mainly about; all that it names matters."""
    cast, rng, rules = story.cast, story.rng, story.grammar.rules
    known = {"hero", *story.needs, *{"pair"} & cast.keys()}
    kin = cast.characters["friend"].owner
    fit = lambda topic: roots(topic) - PRONOUNS["he"].keys() <= known and not (kin and re.search("friend|neighbor|pals|met", literal(topic)))
    general = [[topic for topic in rules[name] if fit(topic)] for name in ("topic", *(f"topic {tag}" for tag in story.premise.about))]
    special = {slot for slot, each in story.must if each is cast and slot in SPECIAL}
    for tries in range(30):
        if "clause" in cast:
            phrase = rng.choice(rules["topic clause"])
        elif "pair" in known:                                   # always asked for, or any friend would be of the hero's kind now and then
            phrase = rng.choice([topic for topic in rules["topic"] if "pair" in roots(topic) and roots(topic) <= known])
        else:
            rng.random()                                        # drawn for nothing: keeps the documents of the shipped demo
            phrase = rng.choice(rng.choice(list(filter(None, general))))
        if all(map(story.matters, roots(phrase))) and (tries > 15 or not special or special & roots(phrase)):
            break
    return phrase


def ask(story, topic):
    """(a request for a story about TOPIC, whether it names the hero besides); when that is "a fox who lost his hat", also "Write a story in
    which a fox lost his hat"."""
    grammar, cast, rng = story.grammar, story.cast, story.rng
    cast["topic"] = topic
    clause = re.match(r"((?:(?! who | that |,).)+),? (?:who|that) (.+)", topic)
    two = clause and (                                          # "needs help and a mouse", "finding out who stole"
        re.search(" and (?:an? |[A-Z])", clause[2]) or re.match("(?:an?|the|his|her) |[A-Z]", clause[2])
        or re.search(r"(?:ing|out|question|about)$", clause[1]))
    if clause and " and " not in clause[1] and not two and rng.random() < 0.25:
        cast["subject"], cast["predicate"], hero = *clause.groups(), cast.characters["hero"]
        if hero.child and hero.name and rng.random() < 0.3 and re.fullmatch(
                rf"a (little )?{hero.kind}( (named|called) {hero.name})?|{hero.name}", clause[1]):
            cast["my child"] = {"boy": "my son", "girl": "my daughter"}[hero.kind] if rng.random() < 0.6 else "my " + rng.choice(
                {"boy": ["grandson", "nephew", "little brother"], "girl": ["granddaughter", "niece", "little sister"]}[hero.kind])
            return grammar.expand_rule("ask for a child", cast, rng), True
        if rng.random() < 0.15 and re.fullmatch(rf"an? (little )?{re.escape(hero.kind)}", clause[1]):
            return grammar.expand_rule("ask for one", cast, rng), False
        return grammar.expand_rule(scene_rule(story, *clause.groups()), cast, rng), False
    return grammar.expand_rule("ask story", cast, rng), False


def scene_rule(story, subject, predicate):
    """The name of a rule that asks for STORY by SUBJECT and PREDICATE, "a fox", "loses his hat": side by side, as "lose his hat" or "lost
    his hat", or with a sentence for each, if that is of the hero."""
    cast, rng, hero = story.cast, story.rng, story.hero
    kind = rng.random()
    if kind < 0.25 and hero.gender in ("he", "she", "it") and re.fullmatch(
            rf"(?:an?|the) (?:[a-z-]+ )?{re.escape(hero.kind)}(?: (?:named|called) .+)?|{re.escape(hero.name or hero.kind)}(?: the .+)?", subject):
        return "ask scene apart"
    forms = None if predicate.startswith("has to ") else unconjugated(predicate, story.grammar.words["irregular verbs"])
    if kind < 0.6 and forms:
        cast["bare predicate"], cast["past predicate"] = forms
        return "ask scene bare" if kind < 0.47 else "ask scene past"
    return "ask scene"


def by_words(story):
    """(a request that lists words, its topic): "Write a story with the words bridge, lantern and fox", "a fox, with a lantern, on the
    bridge"."""
    cast, rng, must = story.cast, story.rng, story.must + story.extra
    rng.randrange(8)                                            # drawn for nothing: keeps the documents of the shipped demo
    number = rng.choice([1, 1, 2, 2, 3, 3, 4, 5])               # "Dragons!" is a request, too
    if len(must) == 1 and (must[0] in story.extra or must[0][0] in story.background):
        number = 2                                              # who has no part in what happens is not asked for alone
    others = [(slot, cast) for slot in ("hero", *story.needs) if (slot, cast) not in must and story.matters(slot)
              and not (slot == "hero" and ("trait", cast) in must) and (slot not in cast.characters or cast.names(slot)[0] in story.text)]
    story.told = must + rng.sample(others, min(len(others), max(number - len(must), 0))) or [("thing", cast)]
    rng.shuffle(story.told)
    with_a = {"hero", "friend", "thing", "place", "job", "trait"}
    names = {word_for(story, slot, each): slot in with_a for slot, each in story.told}
    if len(names) == 1 and all(names.values()) and rng.random() < 0.4:
        names = {plural(name): False for name in names}
    return informal(tidy(ask_words(story, names)), rng), in_order(story, "", story.told, bare=True)


def word_for(story, slot, cast):
    """What SLOT of CAST is asked for as in a list of words: "brave fox" for a trait."""
    if slot == "trait":
        return f"{story.cast['trait']} {story.cast.characters['hero'].kind}"
    if slot == "weather":
        return f"{story.cast['weather']} weather"
    if slot == "deed":
        return cast.verbs[3]
    if slot == "friend" and story.rng.random() < 0.12 and "friend" in story.begun:
        return "friend"
    return cast.names(slot)[0]


def ask_words(story, words):
    """A request for STORY by WORDS {word: whether it is a noun that takes "a"}, not yet tidy."""
    cast, rng = story.cast, story.rng
    quote, comma = rng.choice(["", "", '"']), rng.choice(["", ","])
    article = lambda word: "the " if re.search(r" of the |^(?:end|edge|bottom|top|foot|other) ", word) else "a "
    articled, quoted = [article(word) * noun + word for word, noun in words.items()], [quote + word + quote for word in words]
    articled = [cast["nature"] if word == re.sub("^(?:an?|the) ", "", cast["nature"]) else word for word in articled]
    cast["words"], cast["plain words"], cast["added words"] = listed(quoted, comma), ", ".join(quoted), " + ".join(quoted)
    cast["articled"], cast["plain articled"] = listed(articled, comma), ", ".join(articled)
    asked, deed = story.grammar.expand_rule("ask words", cast, rng), any(slot == "deed" for slot, _ in story.told)
    for _ in range(30):                                         # bounded, as the word may be "things"
        if not (len(words) == 1 and re.search(r"(?i)\b(?:words|keywords|these|things)\b", asked)
                or deed and re.search(r"(?i)there(?:'?s| is| are)\b|\b(?:see|saw|found|pulled|got|have|has)\b", asked)):
            break
        asked = story.grammar.expand_rule("ask words", cast, rng)
    return asked


def informal(text, rng):
    """TEXT as people type: now and then in small letters or all capitals, without the last full stop or the first article."""
    if rng.random() < 0.15:
        text = text.rstrip(".?!")
    if rng.random() < 0.4:
        text = re.sub(r"^(An?|The) (\w)", lambda found: found[2].upper(), text)
    if rng.random() < (0.4 if len(text) < 40 else 0.08):
        text = text.lower()
    return text.upper() if rng.random() < 0.03 else text


def sloppy(text, rng):
    """TEXT, a request, now and then as it is typed in haste: "gimme a story abt a fox pls", so that none of that is taken for a part of it."""
    if rng.random() > 0.1 or text.isupper():
        return text
    if rng.random() < 0.6:
        for word, others in HASTE.items():
            text = re.sub(rf"(?i)\b{word}\b", lambda _: rng.choice(others), text) if rng.random() < 0.6 else text
    if rng.random() < 0.3:
        text = rng.choice(BEFORE_A_REQUEST) + text[0].lower() + text[1:]
    if rng.random() < 0.6:
        text = text.rstrip(".?! ") + rng.choice(BEHIND_A_REQUEST)
    return text.lower() if rng.random() < 0.7 else text


def questions(story):
    """[(question, answer), ...] about STORY, true of it: those of its trouble, and of names, kinds and places."""
    grammar, cast, rng = story.grammar, story.cast, story.rng
    if not story.of_its_cast:
        return []                                               # of "I", or of the cup, one asks otherwise
    own, needs = grammar.questions.get(f"plot {story.trouble}", []), story.to_be_asked()
    pairs = [(grammar.expand(question, cast, rng), grammar.expand(answer, cast, rng)) for question, answer in own]
    hero, friend = cast.characters["hero"], cast.characters["friend"]
    nameless = {"hero": "nameless", "friend": "nameless friend"}
    asked = lambda slot, each: nameless[slot] if slot in nameless and not each.characters[slot].name else slot
    known = [(asked("hero", cast), cast), ("not there", cast)]
    members = dict.fromkeys([(slot, cast) for slot in needs] + story.must)
    known += [(asked(slot, each), each) for slot, each in members if each is cast or slot in (*SPECIAL, "friend")]
    if "thing" in needs:
        known += [("there", cast)] + [("colored thing", cast)] * (cast.adjective in grammar.words["colors"])
    for name, each in known * 2:
        if name in grammar.questions and not (name == "not there" and cast["animal"] in story.text):
            pairs.append(tuple(grammar.expand(side, each, rng) for side in rng.choice(grammar.questions[name])))
    if hero.kind == friend.kind and "friend" in needs:               # "What was the boy called?" could mean both
        pairs = [pair for pair in pairs if hero.kind not in pair[0] or any(one.name and one.name in pair[0] for one in (hero, friend))]
    for one in (hero, friend):                                  # only a request would have told it
        kind = re.compile(rf"\b{re.escape(one.kind)}\b")
        if one.name and not kind.search(story.text):
            pairs = [pair for pair in pairs if not kind.search(pair[0] + pair[1])]
    rng.shuffle(pairs)
    seen = set()
    return [(informal(tidy(q), rng), tidy(a)) for q, a in pairs if not (q in seen or seen.add(q))]


# 10. Talk: greetings, facts, what it does not know, names and moods

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
           "nineteen twenty").split()
PARTS = [(total, part) for total in range(21) for part in range(total + 1)]       # every sum to 20: total - part + part


class Facts:
    """Pairs of one kind: `pairs` [(X, Y)], `ask` and `say` texts in which X and Y stand for a pair's sides."""

    def __init__(self):
        self.pairs, self.ask, self.say = [], [], []


class Mood:
    """How a system prompt makes it speak. `texts` {key: [Sequence, ...]}: "system" prompts; words "before" and "after" an answer, "storybefore" and
    "storyafter" a story; and answers of its own to a group of talk: "who", "hello", "howareyou"."""

    def __init__(self):
        self.texts = collections.defaultdict(list)


class Talk:
    """What talk.txt says: `groups` {name: (user's lines, answers)}, `facts`, `unknown` and `dontknow` {rule or "": texts},
    `system` prompts that give a name with what is said of it (`named`), `moods`, `remarks` around stories."""

    def __init__(self):
        self.groups, self.facts, self.moods = collections.defaultdict(lambda: ([], [])), collections.defaultdict(Facts), {}
        self.unknown, self.dontknow, self.system, self.named = [], collections.defaultdict(list), [], ([], [])
        self.remarks = collections.defaultdict(list)


def read_talk(path, grammar):
    """Read talk.txt into GRAMMAR.talk and its rules. Raises ValueError with file and line for what is wrong."""
    talk, group, mood = grammar.talk, None, None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        try:
            key, _, value = (part.strip() for part in line.partition(":"))
            if not line or line.startswith("#"):
                continue
            elif key.startswith("rule "):
                grammar.rules[key[5:].strip()].append(parse(value))
            elif line.startswith("talk "):
                group, mood = talk.groups[line[5:]], None
            elif line.startswith("mood "):
                mood = talk.moods[line[5:]] = Mood()
            elif key.startswith("facts "):
                facts = talk.facts[key[6:]]
                for pair in filter(str.strip, value.split(";")):
                    x, y = (side.strip() for side in re.split("<=>|=", pair))
                    facts.pairs += [(x, y), (y, x)] if "<=>" in pair else [(x, y)]
            elif key.startswith("ask "):
                talk.facts[key[4:]].ask.append(parse(value))
            elif key.startswith("say "):
                talk.facts[key[4:]].say.append(parse(value))
            elif key == "unknown":
                talk.unknown.append(parse(value))
            elif key.split(" ")[0] == "dontknow":
                talk.dontknow[key[9:].strip()].append(parse(value))
            elif key == "system" and mood is None:
                talk.system.append(parse(value))
            elif mood is not None and key in ("system", "before", "after", "storybefore", "storyafter"):
                mood.texts[key].append(parse(value))
            elif re.match(r"\w*[<>] ?", line):
                name, side, text = re.match(r"(\w*)([<>]) ?(.*)", line).groups()
                if mood is not None and name:
                    mood.texts[name].append(parse(text))
                elif name == "named":
                    talk.named["><".index(side)].append(parse(text))
                elif name:
                    talk.remarks[name + side].append(parse(text))
                else:
                    group["><".index(side)].append(parse(text))
            else:
                raise ValueError(f"not understood: {line[:60]!r}")
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None
    if lacking := [name for name, facts in talk.facts.items() if not (facts.pairs and facts.ask and facts.say)]:
        raise ValueError(f"{path.name}: facts {lacking[0]}: wanted pairs, ask and say")


def sum_beyond(rng):
    """A sum that it cannot do: beyond twenty, often by little, below zero, of three numbers, or a product. None is next to one that it can."""
    low = rng.randint(2, 17)
    high = rng.randint(low + 3, 20)
    return rng.choice([f"{rng.randint(21, 999)} {rng.choice('+-*')} {rng.randint(2, 999)}", f"{low} - {high}", f"{low} * {high}",
                       f"{low} + {high} + {rng.randint(1, 20)}", f"{rng.randint(23 - high, 20)} + {high}", f"{high} + {rng.randint(23 - high, 20)}"])


def sum_turn(grammar, rng):
    """A sum or difference of numbers to 20, or one that is too big, as (question, answer)."""
    total, part = rng.choice(PARTS)
    plus = rng.random() < 0.5
    a, b = (total - part, part) if plus else (total, part)
    sign, word, result = ("+", "plus", total) if plus else ("-", "minus", total - part)
    cast = {"a": str(a), "b": str(b), "sum": f"{a} {sign} {b}", "result": str(result), "in words": f"{NUMBERS[a]} {word} {NUMBERS[b]}",
            "tight": f"{a}{sign}{b}", "spoken": f"{a} {word} {b}"}
    if rng.random() < 0.08:
        cast["sum"] = sum_beyond(rng)
        question = grammar.expand_rule("ask big sum", cast, rng)
        return tidy(question), tidy(grammar.expand_rule("say big sum", cast, rng))
    cast["other words"] = rng.choice([f"{a} add {b}", f"the sum of {a} and {b}", f"{a} and {b} together", f"the total of {a} and {b}"] if plus else
                                     [f"{a} take away {b}", f"the difference of {a} and {b}", f"{a} less {b}", f"{b} less than {a}", f"{b} from {a}"])
    cast["told"] = f"add {a} and {b}" if plus else f"take {b} {rng.choice(['away ', ''])}from {a}"
    if grammar.second:
        cast["told otherwise"] = f"add {b} to {a}" if plus else rng.choice([f"subtract {b} from {a}", f"take {b} from {a}"])
        cast["other words"] = re.sub(r"\d+", lambda number: NUMBERS[int(number[0])], cast["other words"])
    if rng.random() < 0.15 and b > 1 and a - b != 1:
        story = {**cast, "kid": rng.choice(grammar.words[rng.choice(["he names", "she names"])]),
                 "count": rng.choice(["apples", "shells", "marbles", "cookies", "books"])}
        name = "word sum" if plus else "word difference"
        return tidy(grammar.expand_rule("ask " + name, story, rng)), tidy(grammar.expand_rule("say " + name, story, rng))
    ask = "ask sum otherwise" if grammar.second and rng.random() < 0.5 else "ask sum"
    return informal(tidy(grammar.expand_rule(ask, cast, rng)), rng), tidy(grammar.expand_rule("say sum", cast, rng))


class Speaker:
    """Makes turns (user, assistant) of small talk; keeps what was said of names in one conversation."""

    def __init__(self, grammar, rng, mood=None, name=None):
        self.grammar, self.rng, self.mood, self.name = grammar, rng, mood, name
        self.cast, self.user = Cast(grammar, rng), None

    def pair(self, users, answers):
        """One of USERS with one of ANSWERS, rules in both bound to the same text."""
        bound = {}
        question = self.grammar.expand(self.rng.choice(users), self.cast, self.rng, bound)
        return informal(tidy(question), self.rng), tidy(self.grammar.expand(self.rng.choice(answers), self.cast, self.rng, bound))

    def small_talk(self):
        """A turn of one of the groups; in a mood or under a name, greetings and "who are you" are answered in it."""
        groups = self.grammar.talk.groups
        group = self.rng.choice([name for name in groups if name not in ("myname", "recallname", "unknownname")])
        if self.rng.random() < 0.09:
            return self.names()
        users, answers = groups[group]
        if self.mood and group in self.mood.texts:
            answers = self.mood.texts[group]
        elif self.name and group == "who":
            return self.named()
        return self.pair(users, answers)

    def names(self):
        """The user tells a name, or asks for it later."""
        groups = self.grammar.talk.groups
        if self.user is None and self.rng.random() < 0.7:
            self.user = self.cast["user"]
            return self.pair(*groups["myname"])
        return self.pair(groups["recallname"][0], groups["recallname" if self.user else "unknownname"][1])

    def named(self):
        """A question for the name that the system prompt gave."""
        self.cast["name"] = self.name
        return self.pair(*self.grammar.talk.named)

    def in_mood(self):
        """ "Who are you?", "How are you?" or a greeting, answered in the mood."""
        group = self.rng.choice([name for name in ("who", "hello", "howareyou") if self.mood.texts[name]])
        return self.pair(self.grammar.talk.groups[group][0], self.mood.texts[group])

    def fact(self):
        """A question about a pair of one of the lists of facts."""
        lists = list(self.grammar.talk.facts.values())
        facts = self.rng.choices(lists, [len(facts.pairs) ** 0.5 for facts in lists])[0]
        x, y = self.rng.choice(facts.pairs)
        put = lambda texts: re.sub(r"\b[XY]\b", lambda m: x if m[0] == "X" else y, self.grammar.expand(self.rng.choice(texts), self.cast, self.rng))
        return informal(tidy(put(facts.ask)), self.rng), tidy(put(facts.say))

    def unknown(self):
        """A question that it cannot answer."""
        talk, bound = self.grammar.talk, {}
        question = self.grammar.expand(self.rng.choice(talk.unknown), self.cast, self.rng, bound)
        fitting = [name for name in talk.dontknow if name in bound]
        answers = talk.dontknow[self.rng.choice(fitting)] if fitting and self.rng.random() < 0.6 else talk.dontknow[""]
        return informal(tidy(question), self.rng), tidy(self.grammar.expand(self.rng.choice(answers), self.cast, self.rng, bound))

    def coat(self, answer, story=False):
        """ANSWER with the mood's words around it."""
        if self.mood is None:
            return answer
        first, last = ("storybefore", "storyafter") if story else ("before", "after")
        word = lambda kind: tidy(self.grammar.expand(self.rng.choice(self.mood.texts[kind]), self.cast, self.rng)) if self.mood.texts[kind] else ""
        joint = "\n\n" if story else " "
        if story or self.rng.random() < 0.4:
            return joint.join(filter(None, [word(first), answer, word(last)]))
        return joint.join(filter(None, [word(first), answer] if self.rng.random() < 0.5 else [answer, word(last)]))


# 11. Documents

# A document is a list of strings, by turns such as are only read (a question) and such as are learned (its answer); together they are
# its text.

# What a request and the first words of its story share, whatever they are about.
FRAME = set("""about after again also although always because been before began begin behind best brother called came cannot child children could does
            each even ever every friend friends from have here inside into just know like likes little lived more most much named near never
            nobody once only over please short should sister some somebody something story stories tale tell than that their them then there
            they this time under until very want wanted wants were what when where which while whom whose will wish with would yes""".split())

# ... and what no name is, though it begins a sentence.
NO_NAMES = set("let listen tell imagine long early late soon today make put add use just how who write give".split())


def chat(turns, system=None):
    """ChatML of TURNS [(user, assistant), ...]."""
    pieces, before = [], f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for user, assistant in turns:
        pieces += [f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", f"{assistant}<|im_end|>"]
        before = "\n"
    return pieces


def tell(grammar, rng, hero=None, asked=True):
    """A Story that a user asks for, by what is in it or by what happens; about HERO, if there was one of him. Not ASKED: by "another one!".
    Raises ValueError where no premise is found that can be told of HERO."""
    rng.random()                                                # drawn for nothing: keeps the documents of the shipped demo
    of_premise = not asked or rng.random() < 0.92
    for _ in range(1000):
        try:
            if of_premise:
                return PremiseStory(grammar, rng, grammar.a_premise(rng), asked, hero)
            source = rng.choice(grammar.situations_of[rng.choice(["a situation", "a situation", "a situation", "any words"])])
            story = Story(grammar, rng, source, asked=True)
        except ValueError:
            continue
        if story.hero.gender in ("he", "she", "it"):            # nobody asks for "I", or for "the ducks" by one of these
            return story
    raise ValueError(f"nothing to tell of {hero}")


def continued(grammar, rng, named=False):
    """A Story that goes on from a beginning of any sort. NAMED: from one whose first word is a slot."""
    rng.random()                                                # drawn for nothing: keeps the documents of the shipped demo
    sorts = {"a situation": 7, "any words": 1, "one's own": 1, "an opening": 2, "premise": 0 if named else 2}
    while True:
        sort = rng.choices(list(sorts), sorts.values())[0]
        if sort == "premise":
            with contextlib.suppress(ValueError):
                return PremiseStory(grammar, rng, grammar.a_premise(rng), asked=False, begun=True)
            continue
        source = rng.choice(grammar.situations_of[sort] if sort != "an opening" else rng.choice([grammar.openings, grammar.any_openings]))
        if isinstance(source, Opening):
            source = source.drawn(grammar, rng)
            if source.pair or named and not source.starts_with_slot:        # no plot is of two of a kind, as some beginnings are
                continue
        try:
            story = Story(grammar, rng, source, named)
        except ValueError:
            continue
        if story.trouble != "plain" or rng.random() < 0.35:         # a user's beginning mostly has some trouble
            return story


def story_turn(story, speaker):
    """(what the user asks, the story): by topic, by words, or by a beginning to be continued."""
    grammar, rng = story.grammar, story.rng
    if story.foreign:
        story.cast["opening"] = story.begun
        return tidy(grammar.expand_rule("ask continue", story.cast, rng)), speaker.coat(story.text[len(story.begun):].lstrip(), story=True)
    asked, text = asked_for(story)
    if speaker.mood is None and rng.random() < 0.03:
        text = tidy(grammar.expand(rng.choice(grammar.talk.remarks["offer<"]), story.cast, rng)) + "\n\n" + text
    return asked, speaker.coat(text, story=True)


def asked_for(story):
    """(a request for STORY, its text): of a premise behind a sentence that says what it is about, and before what of it has not come again; of a
    situation the text alone, which begins with what was asked for."""
    if isinstance(story, PremiseStory):
        text = echoed(story) + recalling(story)
        return story.asked, story.text if story.brief and len(text.split()) > 270 else text
    return plot_request(story), story.text


def echoed(story):
    """A first sentence that says what STORY, a PremiseStory, was asked for, in one order whatever the user's; "" where that was nothing, or in one of
    twenty."""
    story.cast["topic"] = story.topic or ""
    return tidy(story.grammar.expand_rule("echo", story.cast, story.rng)) + " " if story.topic and story.rng.random() < 0.95 else ""


def recalling(story):
    """The text of STORY, a PremiseStory, with a last word on each member, but a second thing or friend, that was asked for and is not in its second half."""
    cast, text, rules = story.cast, story.text, story.grammar.rules
    end = text[len(text) // 2:]
    missed = [slot for slot, each in dict.fromkeys(story.told) if each is cast and slot != "trait" and f"coda {slot}" in rules
              and not (slot == "friend" and "pair" in cast) and not any(
                  name in end for name in (cast.verbs if slot == "deed" else cast.names(slot)) if name)]
    return " ".join([text, *(tidy(story.grammar.expand_rule(f"coda {slot}", cast, story.rng)) for slot in missed)])


def plain_story(grammar, rng):
    """A story alone, without a chat around it: what a prompt without a template is continued from. A beginning is only read, but half of those that
    are ours as they stand, which are told as from "Once upon a time"; so is now and then a story that says first what it is about."""
    if rng.random() < 0.1:
        return ["", asked_for(tell(grammar, rng))[1]]
    story = continued(grammar, rng)
    begun = "" if story.own and rng.random() < 0.5 else story.begun
    return [begun, story.text[len(begun):]]


def story_chat(grammar, rng):
    """One request and its story; often questions about it, and sometimes a second story, or more."""
    speaker = Speaker(grammar, rng)
    story = (continued if rng.random() < 0.16 else tell)(grammar, rng)
    turns = [story_turn(story, speaker)]
    if rng.random() < 0.5:
        turns += questions(story)[:rng.choice([1, 1, 2, 3])]
        if rng.random() < 0.2:
            kind = rng.choice(["liked", "disliked", "why"])
            turns.append(speaker.pair(*(grammar.talk.remarks[kind + side] for side in "><")))
        if rng.random() < 0.3:
            turns.append(rng.choice([speaker.small_talk, speaker.fact, speaker.unknown, lambda: sum_turn(grammar, rng)])())
    while len(turns) < 9 and rng.random() < 0.3:
        turn, story = second_story(story, speaker)
        turns += [turn] + questions(story)[:rng.choice([0, 0, 1, 2])]
    return chat(turns)


def begun(grammar, rng):
    """A request or a beginning, in a chat or alone, and its story up to the plot's turn: less than half of the tokens, for all that there is to learn
    of requests, above all to copy any word from anywhere. Every second time only up to the end of the plot's start, with other words. What is read
    last, nothing, keeps the end of the document from being learned."""
    speaker = Speaker(grammar, rng)
    story = continued(grammar, rng, named=rng.random() < 0.4) if rng.random() < 0.5 else tell(grammar, rng)
    alone = story.foreign and rng.random() < 0.7
    asked, text = (story.begun, story.text[len(story.begun):]) if alone else story_turn(story, speaker) if story.foreign else asked_for(story)
    ends = [match.end() for match in re.finditer(r'(?<!Mr)(?<!Mrs)[.!?]"?(?=\s)', text)]
    other_words = rng.random() < 0.5
    length = story.until_start if other_words else story.length
    length += -len(story.begun) if story.foreign else text.index(story.text)            # a user's beginning is not in the text
    text = text[:max(end for end in ends if end <= max(length, ends[0]))]
    if other_words:
        asked, text = reworded(asked, text, grammar, rng)
    return [asked if alone else f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", text, ""]


def reworded(asked, text, grammar, rng):
    """ASKED and TEXT with other words for one or two that they share, mostly such as there are not, and other names for some names: "a fox
    named Pip" -> "a plimo named Omar"."""
    shared = set.intersection(*(set(re.findall(r"(?<![-'])\b[A-Za-z][a-z]{2,}\b(?!-)", each)) for each in (asked, text)))
    names = {word for word in shared if word[0].isupper() and word.lower() not in STARTS | FRAME | NO_NAMES
             and not re.search(rf"\bthe (?:[A-Z][a-z]+ )*{word}\b", asked)}                 # the Milky Way
    words = {word for word in shared if word.islower() and len(word) > 3 and not re.search(rf"\b{word}'", asked)
             and not re.fullmatch(SAID, word)} - FRAME
    kinds = ["he names", "she names", "pet names"]
    for word in sorted(names):
        if rng.random() < 0.7:
            alike = [kind for kind in kinds if word in grammar.words[kind]]         # a girl's name for a girl's
            other = rng.choice(grammar.words[rng.choice(alike or kinds)]) if rng.random() < 0.6 else made_up_name(rng)
            asked, text = (re.sub(rf"\b{word}\b", other, each) for each in (asked, text))
    for word in rng.sample(sorted(words), min(len(words), rng.choice([1, 1, 2]))):
        noun = word in grammar.nouns.forms and rng.random() < 0.4
        other = rng.choice(grammar.words[rng.choice(["animals", "things", "nouns"])]) if noun else made_up_name(rng).lower()
        with_article = lambda match: an(f"{match[1]} {other}")
        asked, text = (re.sub(rf"\b{word}\b", other, re.sub(rf"\b([Aa])n? {word}\b", with_article, each)) for each in (asked, text))
    return asked, text


def second_story(story, speaker):
    """((request, text), Story) of another story, asked for by a remark ("another one!") or by a request of its own, or about the same hero."""
    grammar, rng = story.grammar, story.rng
    kind = rng.choice(["again", "again", "new", "new", "more"])
    if kind == "again" and not story.of_its_cast:
        kind = "more"                                           # "I" is no hero of another tale
    if kind == "new":
        other = tell(grammar, rng)
        return story_turn(other, speaker), other
    try:
        other = tell(grammar, rng, story.cast.characters["hero"] if kind == "again" else None, asked=False)
    except ValueError:                                          # nothing more to tell of this hero
        kind, other = "more", tell(grammar, rng, asked=False)
    asked = rng.choice(grammar.rules["ask again"] if kind == "again" else grammar.talk.remarks["more>"])
    return (tidy(grammar.expand(asked, other.cast, rng)), speaker.coat(other.text, story=True)), other


def somebody(grammar, rng):
    """A Speaker with a mood or a name."""
    if rng.random() < 0.5:
        return Speaker(grammar, rng, mood=grammar.talk.moods[rng.choice(list(grammar.talk.moods))])
    names = [rng.choice(grammar.words[kind]) for kind in ("he names", "she names", "pet names")]
    return Speaker(grammar, rng, name=rng.choice([made_up_name(rng), *names]))


def talk_chat(grammar, rng):
    """A conversation of one to nine turns: small talk, sums, facts, unknowns, rarely a story."""
    speaker = Speaker(grammar, rng)
    turns = []
    for _ in range(rng.choice([1, 2, 3, 4, 6, 8])):
        kind = rng.choices([speaker.small_talk, speaker.fact, speaker.unknown, lambda: sum_turn(grammar, rng),
                            lambda: story_turn(tell(grammar, rng), speaker)], [0.36, 0.32, 0.15, 0.13, 0.04])[0]
        turns.append(kind())
    if speaker.user and rng.random() < 0.7:
        turns.append(speaker.names())
    return chat(turns)


def system_chat(grammar, rng):
    """A conversation under a system prompt that gives a name or a mood."""
    speaker = somebody(grammar, rng)
    speaker.cast["name"] = speaker.name or ""
    system = tidy(grammar.expand(rng.choice(speaker.mood.texts["system"] if speaker.mood else grammar.talk.system), speaker.cast, rng))
    turns = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        own = speaker.in_mood if speaker.mood else speaker.named
        kind = rng.choices([own, speaker.small_talk, speaker.fact, speaker.unknown, None], [0.35, 0.2, 0.1, 0.05, 0.3])[0]
        if kind is None:
            turns.append(story_turn(tell(grammar, rng), speaker))
        else:
            user, assistant = kind()
            turns.append((user, assistant if kind == own else speaker.coat(assistant)))
    return chat(turns, system)


def sums_chat(grammar, rng):
    """One to eight sums in a row."""
    return chat([sum_turn(grammar, rng) for _ in range(rng.choice([1, 2, 4, 8]))])


# The kinds of documents, and how many of each, by weight.
KINDS = {plain_story: 0.17, story_chat: 0.26, begun: 0.42, talk_chat: 0.07, system_chat: 0.04, sums_chat: 0.04}

# ... and in the second, short training, of which sums are a good half, also in wordings that the first did not have
SECOND_KINDS = KINDS | {sums_chat: 4.0}
KINDS_BY_NAME = {kind.__name__: kind for kind in KINDS}


def document(grammar, rng):
    """One document of the corpus, its kind drawn by KINDS or SECOND_KINDS, without held-out words."""
    kinds = SECOND_KINDS if grammar.second else KINDS
    while True:
        grammar.words["made-up names"].clear()                  # noted by draw_name, for with_common_names
        pieces = rng.choices(list(kinds), kinds.values())[0](grammar, rng)
        if not grammar.held_out.words & set(re.findall(r"[a-z]+", "".join(pieces).lower())):
            return with_common_names(pieces, grammar.words, rng)


def with_common_names(pieces, words, rng):
    """PIECES of a document with a common name in the place of each made-up one that is not first said where it is only read: those are there to be
    copied, and a story that chooses a name is not to make one up."""
    for name, gender in dict.fromkeys(words["made-up names"]):
        has = re.compile(rf"\b{re.escape(name)}\b")
        first = next((i for i, piece in enumerate(pieces) if has.search(piece)), 0)
        if first % 2:
            text = "".join(pieces)
            other = next((each for each in rng.sample(words[f"{gender} names"], 20) if each not in text), name)
            pieces = [has.sub(other, piece) for piece in pieces]
    return pieces


# 12. The command line

def write_part(arguments):
    """COUNT documents from SEED as JSON lines: one process's share."""
    seed, count = arguments
    grammar, rng = write_part.grammar, random.Random(seed)
    return "".join(json.dumps(document(grammar, rng)) + "\n" for _ in range(count))


def write(path, number, seed, grammar):
    """Write NUMBER documents to PATH, in parts of 1,000 whose text depends on SEED alone, whatever the number of processes. Raises
    ValueError for a PATH that is there and no file, as it would be replaced."""
    from tqdm import tqdm
    if path.exists() and not path.is_file() or not path.name:
        raise ValueError(f"{path}: wanted a file to write, found something else")
    write_part.grammar = grammar
    parts = [(f"{seed} {first}", min(1000, number - first)) for first in range(0, number, 1000)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    with multiprocessing.get_context("fork").Pool() as pool, open(part, "w") as file:
        for text in tqdm(pool.imap(write_part, parts), total=len(parts), unit="k", file=sys.stderr):
            file.write(text)
    part.replace(path)


def story_of(grammar, name, rng):
    """A Story of the premise, plot or situation NAME ("all": of any). Raises ValueError where none can be told."""
    plot, reason = grammar.plots.get(name), "no beginning gets it"
    sources = [each for each in grammar.situations.values() if plot and each.trouble == plot.trouble]
    for _ in range(1000):
        try:
            if name == "all":
                return tell(grammar, rng)
            if name in grammar.premises:
                return PremiseStory(grammar, rng, grammar.premises[name], asked=True)
            story = Story(grammar, rng, rng.choice(sources) if plot else grammar.situations[name])
            if plot in (None, story.plot):
                return story
        except ValueError as error:
            reason = error
    raise ValueError(f"{name}: nothing to tell: {reason}")


def show(grammar, name, count, seed):
    """Print COUNT requests and stories of NAME, as for story_of, or documents of the kind NAME. Raises ValueError where there is none."""
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        if name in KINDS_BY_NAME:
            print("".join(KINDS_BY_NAME[name](grammar, rng)), end="\n\n")
            continue
        story = story_of(grammar, name, rng)
        asked, text = story_turn(story, Speaker(grammar, rng))
        print(f"--- {story.source.name}; plot {story.plot.name}\n> {asked}\n\n{text}\n")
        for question, answer in questions(story)[:3]:
            print(f"> {question}\n{answer}")
        print()


def check(grammar, count=40):
    """Tell every premise COUNT times and every situation up to COUNT times, until it has been told, with its questions; report how long the stories of
    each premise and of each plot are, and what is never told, with the reasons, and every slot or rule that is not there."""
    lengths, plots = collections.defaultdict(list), collections.defaultdict(list)
    for name, source in (grammar.premises | {f"situation {name}": each for name, each in grammar.situations.items()}).items():
        failed, of_premise = collections.Counter(), isinstance(source, Premise)
        for i in range(count):
            rng = random.Random(f"check {name} {i}")
            try:
                story = PremiseStory(grammar, rng, source, asked=True) if of_premise else Story(grammar, rng, source)
                questions(story)
            except (ValueError, KeyError) as error:
                failed[f"{type(error).__name__}: {error.args[0]}"] += 1
                continue
            lengths[name].append(story.number_of_words)
            plots[f"plot {story.plot.name}"].append(story.number_of_words)
            if not of_premise:
                break
        slips = [error for error in failed if error.startswith("KeyError")] or (list(failed) if name not in lengths else [])
        print(*(f"{name}: {error}\n" for error in slips[:3]), sep="", end="")
    told = {name: lengths[name] for name in grammar.premises} | {name: plots[name] for name in map("plot {}".format, grammar.plots)}
    for name, each in told.items():
        print(f"{name}: {len(each)} stories" + (f" of {sum(each) / len(each):.0f} words" if each else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=400_000, help="how many (400000)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    parser.add_argument("--second", action="store_true", help="documents of the second, short training instead: more sums")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="where to (build/demo/documents.jsonl, with --second build/second/documents.jsonl)")
    parser.add_argument("--show", metavar="NAME", help='print some stories: of a premise, plot or situation, "all", or ' + ", ".join(KINDS_BY_NAME))
    parser.add_argument("--count", type=int, help="how many (5)")
    parser.add_argument("--check", action="store_true", help="tell everything that can be told, and report slips")
    arguments = parser.parse_args()
    if arguments.documents < 1 or arguments.count is not None and arguments.count < 1:
        parser.error("--documents and --count must be at least 1")
    if arguments.count is not None and arguments.show is None:
        parser.error("--count: of what --show shows, which is not given")
    try:
        grammar = Grammar(second=arguments.second)
        known = {"all", *grammar.premises, *grammar.plots, *grammar.situations, *KINDS_BY_NAME}
        if arguments.show is not None and arguments.show not in known:
            parser.error(f"--show: nothing is named {arguments.show}; there are all, the "
                         f"kinds of documents, the situations of tales/, and {', '.join(sorted({*grammar.premises, *grammar.plots}))}")
        if arguments.check:
            check(grammar)
        elif arguments.show:
            show(grammar, arguments.show, arguments.count or 5, arguments.seed)
        else:
            output = arguments.output or HERE.parent / "build" / ("second" if arguments.second else "demo") / "documents.jsonl"
            write(output, arguments.documents, arguments.seed, grammar)
    except OSError as error:
        sys.exit(f"corpus.py: {error.filename or 'standard output'}: {error.strerror}")
    except ValueError as error:                                 # names file and line
        sys.exit(f"corpus.py: {error}")
    except KeyError as error:                                   # of a slot or a rule that is not
        sys.exit(f"corpus.py: {error.args[0]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
