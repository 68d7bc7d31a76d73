// A text field with a list of titles that fit: a combobox as the ARIA practices have it.

const PAUSE = 120; // milliseconds after the last letter

export class Picker {
  constructor(input, list, find, pick, fail) {
    Object.assign(this, { input, list, find, pick, fail });
    this.titles = [];
    this.active = -1;
    this.asked = 0;
    input.addEventListener("input", () => this.later());
    input.addEventListener("click", () => this.search());
    input.addEventListener("blur", () => this.close());
    input.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.choose(Number(option.dataset.place));
    });
  }

  get open() {
    return !this.list.hidden;
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.search(), PAUSE);
  }

  async search() {
    clearTimeout(this.timer);
    this.timer = undefined;
    const number = ++this.asked;
    try {
      const titles = await this.find(this.input.value);
      if (number === this.asked && document.activeElement === this.input) this.show(titles);
    } catch (error) {
      if (number === this.asked) this.fail(error);
    }
  }

  show(titles) {
    this.titles = titles;
    this.list.replaceChildren(...titles.map((title, place) => this.option(title, place)));
    if (!titles.length) {
      const none = document.createElement("li");
      none.className = "none";
      none.textContent = "No title fits.";
      this.list.append(none);
    }
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.mark(titles.length && this.input.value.trim() ? 0 : -1);
  }

  option(title, place) {
    const item = document.createElement("li");
    item.id = `option-${place}`;
    item.dataset.place = place;
    item.setAttribute("role", "option");
    item.textContent = title;
    return item;
  }

  mark(place) {
    this.active = place;
    for (const [other, item] of [...this.list.querySelectorAll("[role=option]")].entries()) {
      item.setAttribute("aria-selected", String(other === place));
      if (other === place) item.scrollIntoView({ block: "nearest" });
    }
    if (place < 0) this.input.removeAttribute("aria-activedescendant");
    else this.input.setAttribute("aria-activedescendant", `option-${place}`);
  }

  close() {
    clearTimeout(this.timer);
    this.timer = undefined;
    this.asked++;
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.mark(-1);
  }

  async choose(place) {
    const title = this.titles[place];
    if (title === undefined) return;
    this.input.value = "";
    this.close();
    this.pick(title);
  }

  move(step) {
    const count = this.titles.length;
    if (!this.open) this.search();
    else if (count) this.mark((Math.max(this.active, step > 0 ? -1 : 0) + step + count) % count);
  }

  async key(event) {
    if (event.isComposing) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      this.move(event.key === "ArrowDown" ? 1 : -1);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (this.timer) await this.search(); // the list is still that of fewer letters
      if (this.open) this.choose(this.active);
    } else if (event.key === "Escape") {
      if (!this.open) this.input.value = "";
      this.close();
    }
  }
}
