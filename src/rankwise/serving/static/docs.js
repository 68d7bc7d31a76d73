// openapi.json as a page: each path with its parameters, the fields of its body, and its answers.

import { ask } from "./server.js";

const main = document.getElementById("main");

function make(kind, text = "", ...children) {
  const part = document.createElement(kind);
  part.textContent = text;
  part.append(...children);
  return part;
}

function table(head, rows) {
  const line = (cell, cells) => make("tr", "", ...cells.map((text) => make(cell, text)));
  return make("table", "", make("thead", "", line("th", head)), make("tbody", "", ...rows.map((row) => line("td", row))));
}

function type(schema = {}) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(type).join(" or ");
  return schema.type === "array" ? `list of ${type(schema.items)}` : schema.type || "any";
}

function limits(schema = {}) {
  const names = { minimum: "at least", maximum: "at most", minItems: "items from", maxItems: "to", default: "default" };
  const own = Object.entries(names).filter(([name]) => schema[name] != null);
  const inner = (schema.anyOf || []).map(limits).filter(Boolean);
  return [...own.map(([name, words]) => `${words} ${schema[name]}`), ...inner].join(", ");
}

function fields(schema) {
  const rows = Object.entries(schema.properties || {});
  return table(["field", "type", ""], rows.map(([name, one]) => [name, type(one), about(one)]));
}

function about(schema) {
  return [schema.description, limits(schema)].filter(Boolean).join(" ");
}

function operation(path, method, { description, summary, parameters = [], requestBody, responses }, schemas) {
  const card = make("section", "", make("h2", `${method.toUpperCase()} ${path}`), make("p", description || summary));
  card.className = "card";
  if (parameters.length) {
    const rows = parameters.map(({ name, schema, description: text }) => [name, type(schema), text || about(schema)]);
    card.append(table(["parameter", "type", ""], rows));
  }
  const body = requestBody?.content["application/json"]?.schema;
  if (body) card.append(fields(schemas[type(body)] || {}));
  const answers = Object.entries(responses).map(([status, one]) => {
    const schema = one.content?.["application/json"]?.schema;
    return [status, schema ? type(schema) : "text"];
  });
  card.append(table(["status", "answer"], answers));
  return card;
}

async function begin() {
  try {
    const { paths, components } = await ask("openapi.json");
    const schemas = components.schemas;
    for (const [path, methods] of Object.entries(paths)) {
      for (const [method, one] of Object.entries(methods)) main.append(operation(path, method, one, schemas));
    }
    for (const [name, schema] of Object.entries(schemas)) {
      const card = make("section", "", make("h2", name), make("p", schema.description || ""), fields(schema));
      card.className = "card";
      main.append(card);
    }
  } catch (error) {
    const problem = make("p", error.message);
    problem.className = "notice";
    main.append(problem);
  }
}

begin();
