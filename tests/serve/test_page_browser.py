"""The page of `fastgpt serve` in a real browser: what a reader sees, by pointer, by keyboard and on a phone."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.baselines import MODELS
from fastgpt.serve import page as page_of
from fastgpt.tokenizer import CharTokenizer
from served_page import chromium, completion

pytest.importorskip("starlette", reason="the page needs the extra serve")

from served_models import listening

TOKENIZER = CharTokenizer.train("the cat sat on the mat.\n<script>img src=x onerror=\"hit='1'\"</script>")
LONG = 100_000  # tokens: more than come before a test stops them
LOSSES = [{"step": 10 * i, "split": split, "loss": 4 / (1 + i)} for i in range(6) for split in ("train", "val")]


def model_of(kind: str):
    torch.manual_seed(0)
    shape = {"block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0}
    model = MODELS[kind](GPTConfig(vocab_size=TOKENIZER.vocab_size, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.9)
    model.tokenizer = TOKENIZER
    return model.eval()


def app_of(model, name: str = "cats", run=None, token=None):
    from fastgpt.serve.app import Options, create_app
    from fastgpt.serve.engine import Engine

    options = Options(max_tokens=LONG, token=token)
    return create_app(model, TOKENIZER, Engine(model, TOKENIZER, size=2), name=name, run=run, options=options)


@pytest.fixture(scope="module")
def model():
    return model_of("gpt")


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOSSES), encoding="utf-8")
    with listening(app_of(model, run=run)) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def open_page(browser, address):
    """`open_page(fragment)`: the page in a new window. No other host is asked, and nothing is said on the console."""
    contexts, said, asked = [], [], []

    def visit(fragment: str = "", at: str = address, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{at}/#{fragment}")
        page.said = said
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in asked), asked


def answer(page, body: str, status: int = 200) -> list[dict]:
    """Let completions be answered with `body`; returns the list of what will be asked."""
    asked: list[dict] = []

    def fulfill(route):
        asked.append({**route.request.post_data_json, "authorization": route.request.headers.get("authorization")})
        kind = "text/event-stream" if status == 200 else "application/json"
        route.fulfill(status=status, body=body, content_type=kind)

    page.route("**/v1/completions", fulfill)
    return asked


def tokens(page):
    return page.locator("#output .token")


def generate(page) -> None:
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Copy text").wait_for()


def text_of(page) -> str:
    return page.locator("#output").text_content()


# ---- generation ----


def test_a_text_streams_in_and_can_be_stopped(open_page):
    page = open_page(f"prompt=the&max_tokens={LONG}&seed=3")
    page.get_by_role("button", name="Generate").click()
    tokens(page).nth(5).wait_for()
    stop = page.get_by_role("button", name="Stop")
    assert stop.is_enabled() and page.locator("#output").get_attribute("aria-busy") == "true"
    assert page.locator("#announcement").text_content() == "Generating"  # and not each token
    stop.click()
    page.get_by_role("button", name="Copy text").wait_for()
    n = tokens(page).count()
    assert 5 < n < LONG and "stopped" in page.locator("#status").text_content() and stop.is_disabled()
    assert text_of(page).startswith("the") and len(text_of(page)) == 3 + n  # what came is kept
    assert text_of(page)[3:] in page.locator("#announcement").text_content()


def test_a_seed_in_the_address_repeats_a_text_and_settings_are_shared_by_it(open_page):
    fragment = (
        "prompt=the+cat&max_tokens=12&seed=5&temperature=1.5&top_k=7&top_p=0.9&repetition_penalty=1.2&stop-text=%5Cn"
    )
    page = open_page(fragment)
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    generate(page)
    first = text_of(page)
    generate(page)
    assert text_of(page) == first
    sent = {name: asked[0][name] for name in ("prompt", "max_tokens", "seed", "temperature", "top_k", "top_p", "stop")}
    drawn = {"max_tokens": 12, "seed": 5, "temperature": 1.5, "top_k": 7, "top_p": 0.9}
    assert sent == {"prompt": "the cat", "stop": "\n", **drawn}
    assert asked[0]["repetition_penalty"] == 1.2 and asked[0]["logprobs"] == 5 and asked[0]["model"] == "cats"
    page.get_by_label("Prompt").fill("a mat & a cat")
    page.get_by_label("Top-k").fill("")
    page.reload()
    assert page.get_by_label("Prompt").input_value() == "a mat & a cat"
    assert page.get_by_label("Top-k").input_value() == "" and page.get_by_label("Seed").input_value() == "5"


def test_a_random_seed_is_told_and_can_be_kept(open_page):
    page = open_page("max_tokens=3")
    generate(page)
    seed = re.search(r"seed (\d+)", page.locator("#status").text_content())[1]
    page.get_by_role("button", name="Keep this seed").click()
    assert page.get_by_label("Seed").input_value() == seed and f"seed={seed}" in page.url
    assert text_of(page).startswith("\n")  # an empty prompt stands for a line break


def test_a_text_is_continued(open_page):
    page = open_page("prompt=the&max_tokens=4&seed=1")
    generate(page)
    before = text_of(page)
    page.get_by_role("button", name="Continue").click()
    tokens(page).nth(7).wait_for()
    assert text_of(page).startswith(before) and tokens(page).count() == 8


def test_of_a_text_that_is_longer_than_the_context_the_end_is_continued(open_page):
    page = open_page("prompt=" + "the+cat+sat+" * 9)
    asked = answer(page, completion("a"))
    generate(page)
    assert asked[0]["prompt"] == ("the cat sat " * 9)[-48:] and text_of(page) == "the cat sat " * 9 + "a"


@pytest.mark.parametrize("is_allowed", [True, False], ids=["allowed", "refused"])
def test_the_text_is_copied_or_selected(open_page, is_allowed):
    page = open_page("prompt=the&max_tokens=4&seed=1", permissions=["clipboard-read", "clipboard-write"])
    generate(page)
    if not is_allowed:
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('none here')); }")
    page.get_by_role("button", name="Copy text").click()
    page.get_by_role("button", name="Copied" if is_allowed else "Selected").wait_for()
    found = page.evaluate("navigator.clipboard.readText()" if is_allowed else "getSelection().toString()")
    assert found.strip() == text_of(page).strip()


def test_a_setting_that_cannot_be_is_not_sent(open_page):
    page = open_page("max_tokens=0")
    asked = answer(page, completion("a"))
    page.get_by_role("button", name="Generate").click()
    assert page.evaluate("document.activeElement.id") == "max_tokens" and asked == []


# ---- the alternatives of a token ----


def check_alternatives(page) -> None:
    shown = page.get_by_role("dialog")
    shown.wait_for()
    assert re.search(r"probability \d+\.\d %", shown.text_content())
    assert shown.get_by_role("listitem").count() in (5, 6)  # the likeliest, and the one that was drawn


def test_alternatives_are_shown_under_the_pointer_and_go_away(open_page):
    page = open_page("prompt=the&max_tokens=20&seed=1")
    generate(page)
    tokens(page).nth(4).hover()
    check_alternatives(page)
    page.get_by_role("dialog").hover()  # the pointer may move onto it
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").is_hidden()
    tokens(page).nth(5).hover()
    page.mouse.move(5, 5)
    page.get_by_role("dialog").wait_for(state="hidden")
    tokens(page).nth(6).click()
    page.mouse.move(5, 5)
    page.get_by_role("button", name="Close").click()  # it stays after a click or a tap
    assert page.get_by_role("dialog").is_hidden()


def test_alternatives_are_the_models_own(open_page, model):
    page = open_page("prompt=the&max_tokens=1&seed=1&temperature=0.1")
    generate(page)
    tokens(page).first.hover()
    logits = copy.deepcopy(model).next_logits(torch.tensor([TOKENIZER.encode("the")]))[0]
    likeliest = logits.softmax(-1).topk(3)
    rows = page.get_by_role("dialog").get_by_role("listitem").all_text_contents()
    for row, share, token in zip(rows, likeliest.values.tolist(), likeliest.indices.tolist(), strict=False):
        label = page_of.label(TOKENIZER, token)
        assert row.startswith(label) and abs(float(row.removeprefix(label)[:-2]) - 100 * share) < 0.1


def test_another_token_is_chosen_and_the_text_goes_on_from_there(open_page):
    page = open_page("prompt=the")
    asked = answer(page, completion("c", "a", "t", alternatives={"s": -1.0, "bytes:\\xff": -2.0}))
    generate(page)
    tokens(page).nth(1).hover()
    other = page.get_by_role("dialog").get_by_role("listitem").get_by_role("button")
    assert other.count() == 1  # half a character cannot be chosen
    other.click()
    tokens(page).nth(4).wait_for()
    assert asked[1]["prompt"] == "thecs" and text_of(page) == "thecscat"


def test_the_keyboard_alone_is_enough(open_page):
    page = open_page("seed=1&max_tokens=12")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the prompt"
    page.keyboard.press("Enter")
    page.keyboard.type("the")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Copy text").wait_for()
    while page.evaluate("document.activeElement.role") != "option":
        page.keyboard.press("Tab")
    check_alternatives(page)
    page.keyboard.press("End")
    assert "12 of 12" in page.get_by_role("dialog").text_content()
    page.keyboard.press("ArrowLeft")
    assert "11 of 12" in page.get_by_role("dialog").text_content()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel").endswith("go on with it")
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").is_hidden() and page.evaluate("document.activeElement.role") == "option"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    tokens(page).nth(12).wait_for()  # the chosen one, and twelve more
    page.get_by_role("button", name="Copy text").wait_for()
    page.get_by_label("Token", exact=True).wait_for()
    while page.evaluate("document.activeElement.id") != "map":
        page.keyboard.press("Tab")
    before = page.locator("#map-readout").text_content()
    page.keyboard.press("ArrowUp")
    assert page.locator("#map-readout").text_content() != before
    while page.evaluate("document.activeElement.id") != "curve":
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#curve-readout").text_content() == "step 40: train 0.800, val 0.800"


def test_tokens_are_coloured_by_probability_and_say_it(open_page):
    page = open_page("prompt=the&max_tokens=30&seed=2")
    generate(page)
    ground = "[...document.querySelectorAll('#output .token')].map((token) => getComputedStyle(token).backgroundColor)"
    assert len(set(page.evaluate(ground))) == 1
    page.get_by_label("Colour tokens by probability").check()
    assert len(set(page.evaluate(ground))) > 1
    assert re.fullmatch(r".+, (< )?\d+(\.\d)? %", tokens(page).first.get_attribute("aria-label"))


# ---- attention and the loss ----


def test_the_attention_map_shows_the_weights_of_the_chosen_head(open_page, model):
    page = open_page("prompt=the+cat&max_tokens=30&seed=1")
    generate(page)
    page.get_by_label("Layer", exact=True).select_option("2")
    page.get_by_label("Head", exact=True).select_option("2")
    page.get_by_role("application", name="Attention map of layer 2, head 2").wait_for()
    shown = page_of.last_tokens(model, TOKENIZER, text_of(page))
    found = page_of.attention_map(copy.deepcopy(model), TOKENIZER, shown, 2, 2)
    page.get_by_label("Last tokens").select_option("16")
    page.get_by_label("Token", exact=True).select_option("9")
    row = len(found["labels"]) - 16 + 9
    column = max(range(row - 9, row + 1), key=lambda j: found["weights"][row][j])  # of equal ones the first
    share = found["weights"][row][column]
    said = page.locator("#map-readout").text_content()
    label = found["labels"]
    assert said == f"{label[row]} ({row + 1}) attends {share:.2f} to {label[column]} ({column + 1})"
    assert page.locator("#most").get_by_role("listitem").first.text_content().endswith(f"{share:.2f}")
    assert page.locator("#map .cell").count() <= 16 * 17 / 2  # no token sees those after it
    page.locator("#map .seen").nth(5).hover(position={"x": 2, "y": 5}, force=True)
    i, j = len(label) - 16 + 5, len(label) - 16
    assert (
        f"({i + 1}) attends {found['weights'][i][j]:.2f} to {label[j]} ({j + 1})"
        in page.locator("#map-readout").text_content()
    )


def test_the_loss_curve_has_both_losses_words_and_a_tooltip(open_page):
    page = open_page()
    page.locator("#curve path.val").wait_for()
    assert page.locator("#curve path").count() == 2 and "-0" not in page.locator("#curve text").all_text_contents()
    assert {"step", "loss, nats per token", "train", "val"} <= set(page.locator("#curve text").all_text_contents())
    assert (
        page.locator("#curve-words").text_content().startswith("The validation loss fell from 4.00 at step 0 to 0.667")
    )
    page.locator("#curve").hover(position={"x": 100, "y": 60})
    assert re.match(r"step \d+train \d\.\d{3}val \d\.\d{3}", page.locator(".tooltip").text_content())


def test_a_model_without_attention_or_run_says_so(open_page):
    with listening(app_of(model_of("lstm"), name="lstm")) as other:
        page = open_page("prompt=the&max_tokens=5", at=other)
        generate(page)
        assert page.locator("#attention-why").text_content() == "A model of kind lstm has no attention."
        assert "without the metrics of a run" in page.locator("#curve-why").text_content()
        assert page.locator("#attention-panel").is_hidden() and page.locator("#curve-figure").is_hidden()
        page.context.close()


def test_the_facts_of_the_model_are_there(open_page, model):
    page = open_page()
    facts = page.locator("#facts")
    facts.get_by_text("Parameters").wait_for()
    assert f"{model.num_parameters():,}" in facts.text_content() and "48 tokens" in facts.text_content()
    assert page.title() == "cats – FastGPT"


# ---- what goes wrong ----


def is_of_status(text: str, status: int) -> bool:
    return f"status of {status}" in text


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, "The server is busy: the queue is full"),
        (400, "The server does not accept this: the queue is full"),
        (413, "This is too long for the server: the queue is full"),
        (500, "The server failed: the queue is full"),
    ],
)
def test_an_error_of_the_server_is_shown_in_words(open_page, status, said):
    page = open_page("prompt=the")
    answer(page, json.dumps({"error": {"message": "the queue is full"}}), status)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").text_content() == said
    assert page.get_by_role("button", name="Generate").is_enabled()
    page.said[:] = [text for text in page.said if not is_of_status(text, status)]  # the browser's own line


def test_an_error_without_words_has_its_status(open_page):
    page = open_page("prompt=the")
    answer(page, "<html>", 502)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").text_content() == "The server failed (HTTP 502)."
    page.said[:] = [text for text in page.said if not is_of_status(text, 502)]


@pytest.mark.parametrize("cut", ["", 'data: {"error": {"message": "out of memory"}}\n\n'], ids=["cut off", "told"])
def test_a_stream_that_breaks_keeps_what_came(open_page, cut):
    page = open_page("prompt=the")
    answer(page, completion("a", "t").rpartition("data: {")[0] + cut)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").wait_for()
    said = page.get_by_role("alert").text_content()
    assert (
        said == "The server failed: out of memory" if cut else said.startswith("The connection to the server was lost.")
    )
    assert text_of(page) == "theat" and "not finished" in page.locator("#status").text_content()


def test_a_server_that_is_gone_is_said(open_page):
    page = open_page("prompt=the")
    page.locator("#facts dt").first.wait_for()
    page.route("**/v1/completions", lambda route: route.abort())
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").wait_for()
    assert "fastgpt serve still running?" in page.get_by_role("alert").text_content()
    page.said[:] = [text for text in page.said if "ERR_FAILED" not in text]


def test_a_token_is_asked_for_and_sent(open_page):
    with listening(app_of(model_of("gpt"), token="secret")) as guarded:
        page = open_page("prompt=the&max_tokens=5", at=guarded)
        field = page.get_by_label(re.compile("^Token, as fastgpt serve has printed it"))
        for given, said in (("wrong", "asks for a token"), ("secret", "not this server's token")):
            page.get_by_role("alert").filter(has_text=said).wait_for()
            field.fill(given)
            with page.expect_response("**/page/model"):
                page.keyboard.press("Enter")
        field.wait_for(state="hidden")
        generate(page)
        assert page.get_by_role("alert").is_hidden() and tokens(page).count() == 5
        page.locator("#map svg").wait_for()
        assert page.evaluate("[localStorage.length, document.cookie, location.href.includes('secret')]") == [
            0,
            "",
            False,
        ]
        page.said[:] = [text for text in page.said if not is_of_status(text, 401)]
        page.context.close()


# ---- text is never markup ----

HOSTILE = ["<script>hit='1'</script>", "<img src=x onerror=hit='1'>"]


@pytest.mark.parametrize("text", HOSTILE, ids=["script", "img"])
def test_text_that_looks_like_markup_stays_text(open_page, text):
    page = open_page()
    page.get_by_label("Prompt").fill(text)
    answer(page, completion(*HOSTILE, alternatives={text: -1.0}))
    page.route("**/page/attention", lambda route: route.fulfill(json=hostile_map(text)))
    generate(page)
    tokens(page).first.hover()
    page.locator("#map svg").wait_for()
    assert text_of(page) == text + "".join(HOSTILE)
    assert page.evaluate("typeof hit") == "undefined" and page.locator("#output script, img, #map img").count() == 0


def hostile_map(text: str) -> dict:
    weights = [[1.0, 0.0], [0.25, 0.75]]
    return {"layer": 1, "head": 1, "is_causal": True, "first": 1, "labels": [text, "a"], "weights": weights}


# ---- every screen and every reader ----


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_a_horizontal_scroll(open_page, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    page = open_page("prompt=the+cat+sat+on+the+mat&max_tokens=60&seed=1", **phone)
    page.get_by_role("button", name="Generate").tap()
    page.locator("#map svg").wait_for()
    tokens(page).nth(8).tap()
    check_alternatives(page)
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    too_wide = "filter((part) => part.getBoundingClientRect().right > 361).map((part) => part.outerHTML)"
    assert page.evaluate(f"[...document.querySelectorAll('main *')].{too_wide}") == []


CONTRASTS = """() => {
  const parse = (colour) => {
    const found = colour.match(/[\\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 255 : 1; // color(srgb 0.1 0.2 0.3), of a mix
    return [...found.slice(0, 3).map((part) => scale * part), found[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !element.checkVisibility() || element.closest("noscript, select, .unseen, :disabled")) continue;
    const style = getComputedStyle(element);
    const ground = groundOf(element);
    const ink = over(parse(element instanceof SVGElement ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) low.push(`${element.outerHTML.slice(0, 120)} ${contrast.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(open_page, scheme):
    """WCAG 2.2 AA, 1.4.3: at least 4.5."""
    page = open_page("prompt=the&max_tokens=40&seed=2&temperature=2", color_scheme=scheme)
    generate(page)
    page.locator("#map svg").wait_for()
    page.get_by_label("Colour tokens by probability").check()
    tokens(page).nth(3).hover()
    assert page.evaluate(CONTRASTS) == []


def test_what_a_screen_reader_is_told(open_page):
    page = open_page("prompt=the&max_tokens=2&seed=1")
    generate(page)
    page.get_by_label("Token", exact=True).wait_for()
    told = page.locator("body").aria_snapshot()
    for line in (
        "- banner:",
        "- main:",
        "- contentinfo:",
        '- heading "FastGPT cats" [level=1]',
        '- region "Text":',
        '- textbox "Prompt":',
        '- button "Generate"',
        '- button "Stop" [disabled]',
        '- listbox "Generated tokens"',
        '- region "Settings":',
        '- slider "Temperature"',
        '- slider "Top-p"',
        '- slider "Repetition penalty"',
        '- spinbutton "Top-k"',
        '- spinbutton "Tokens"',
        '- spinbutton "Seed"',
        '- textbox "Stop before"',
        '- region "Attention":',
        '- combobox "Layer"',
        '- combobox "Head"',
        '- region "Loss of the run":',
        '- region "Model":',
    ):
        assert line in told, told
    assert re.search(r'- option ".+, [\d.]+ %"', told), told


def test_nothing_moves_for_readers_who_asked_for_it(open_page):
    page = open_page(f"prompt=the&max_tokens={LONG}", reduced_motion="reduce")
    page.get_by_role("button", name="Generate").click()
    tokens(page).first.wait_for()
    assert page.evaluate("document.getAnimations({subtree: true}).length") == 0
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Copy text").wait_for()
