"use strict";

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function add(list, name, description, detail) {
  const about = document.createElement("dd");
  about.append(element("p", description || ""), element("pre", JSON.stringify(detail, null, 2)));
  list.append(element("dt", name), about);
}

fetch("/openapi.json").then((response) => response.json()).then((api) => {
  document.getElementById("title").textContent = `${api.info.title} ${api.info.version}`;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const { parameters, requestBody, responses } = about;
      add(document.getElementById("paths"), `${method.toUpperCase()} ${path}`, about.description, { parameters, requestBody, responses });
    }
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    add(document.getElementById("messages"), name, schema.description, schema);
  }
});
