// Loads a bundle in transformers.js, offline, and compares its labels with those of a file of {text, label} lines.
//   npm install --ignore-scripts
//   node check.mjs BUNDLE EXPECTED.jsonl
import { readFileSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [bundle, expected] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(bundle));
const classify = await pipeline("text-classification", basename(resolve(bundle)), { dtype: "fp32" });
const lines = readFileSync(expected, "utf8").trim().split("\n").map((line) => JSON.parse(line));
let same = 0;
let largest = 0;
for (const { text, label, score } of lines) {
  const [answer] = await classify(text);
  same += answer.label === label;
  largest = Math.max(largest, Math.abs(answer.score - score));
}
console.log(JSON.stringify({ examples: lines.length, same_label: same, largest_score_difference: largest }));
process.exit(same === lines.length ? 0 : 1);
