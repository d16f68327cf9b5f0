// Bundles src/ into page.html: one file without network. The digest of the sources stands in it,
// so that a test finds a page that was not built again.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const { outputFiles } = await build({
  entryPoints: ["src/app.tsx"], bundle: true, minify: true, write: false, target: "es2022",
  jsx: "automatic", jsxImportSource: "preact", legalComments: "inline", charset: "utf8",
});
const digest = createHash("sha256");
const sources = [...readdirSync("src").map((name) => `src/${name}`), "build.mjs", "package-lock.json", "scale.json"];
for (const name of sources.sort()) digest.update(readFileSync(name));
const script = outputFiles[0].text.replaceAll("</script", "<\\/script");
const page = readFileSync("src/shell.html", "utf8")
  .replace("/*STYLE*/", () => readFileSync("src/style.css", "utf8"))
  .replace("/*SCRIPT*/", () => script)
  .replace("SOURCES", digest.digest("hex"));
writeFileSync("page.html", page);
console.log(`page.html: ${page.length} characters`);
