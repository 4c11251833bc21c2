// The map of the domains: where its marks lie, and which labels fit beside them. Knows nothing of the page around it.

import { svg } from "./elements.js";

const CROSSHAIRS = "M-15 0H-5M5 0H15M0-15V-5M0 5V15M9 0A9 9 0 1 1-9 0A9 9 0 1 1 9 0Z";
const EDGE = 30; // pixels left free around the marks

// Draws a map (GET /domains) into an SVG element, with the query that was placed on it (POST /route), if there is one.
// `marker` makes a domain's mark.
export function draw(plane, { terms, centroids }, placed, marker) {
  const place = placed?.place;
  const width = plane.clientWidth; // user units are pixels, so that a label has the size of text on any screen
  const size = [width, Math.round(width * 0.7)];
  const at = projection([...terms, ...centroids].map(({ x, y }) => [x, y]).concat(place ? [place] : []), size);
  const marks = [
    ...terms.map(({ term, domain, x, y }) =>
      marker(domain, ...at(x, y), 3, "sample", svg("title", {}, `${term} (${domain})`))),
    ...centroids.map(({ name, x, y }) =>
      marker(name, ...at(x, y), 8, "centroid", svg("title", {}, `centre of ${name}`))),
  ];
  const nearest = placed?.domains[0].name;
  const wanted = centroids.map(({ name, x, y }) => ["name", name, ...at(x, y)])
    .sort(([, one], [, other]) => (other === nearest) - (one === nearest));
  if (place) {
    marks.push(svg("path", { class: "query", d: CROSSHAIRS, transform: `translate(${at(...place).join(" ")})` }));
    wanted.unshift(["query-name", placed.term, ...at(...place)]);
  }
  plane.setAttribute("viewBox", `0 0 ${size.join(" ")}`);
  plane.replaceChildren(
    svg("title", { id: "plane-title" }, "Map of the domains"),
    svg("desc", { id: "plane-words" }, describe(terms, centroids, placed)),
    ...marks, ...labels(wanted, terms.map(({ x, y }) => at(x, y)), size));
}

function describe(terms, centroids, placed) {
  const names = centroids.map(({ name }) => name).join(", ");
  const query = placed?.place ? ` “${placed.term}” lies nearest to ${placed.domains[0].name}.` : "";
  return `The centres of ${centroids.length} domains (${names}) among ${terms.length} terms.${query}`;
}

// Data to pixels: one scale for both axes, all points inside, y upwards.
function projection(points, [width, height]) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const scale = Math.min((width - 2 * EDGE) / (right - left || 1), (height - 2 * EDGE) / (high - low || 1));
  const [x0, y0] = [(left + right) / 2, (low + high) / 2];
  return (x, y) => [width / 2 + (x - x0) * scale, height / 2 - (y - y0) * scale];
}

// Each label beside its mark, where it hides the fewest terms and neither a mark nor an earlier label; else it is left
// off: the table names every domain with its mark.
function labels(wanted, terms, [width, height]) {
  const taken = wanted.map(([, , x, y]) => [x - 12, y - 12, x + 12, y + 12]);
  const hidden = ([a, b, c, d]) => terms.filter(([x, y]) => x > a - 4 && x < c + 4 && y > b - 4 && y < d + 4).length;
  return wanted.flatMap(([kind, name, x, y]) => {
    const text = name.length > 28 ? `${name.slice(0, 27)}…` : name;
    const half = text.length * 3.9;
    const middle = Math.min(Math.max(x, half + 3), width - half - 3);
    const places = [[middle, y - 18], [middle, y + 27], [x + half + 18, y + 5], [x - half - 18, y + 5]]
      .map(([centre, base]) => [centre - half, base - 12, centre + half, base + 4])
      .filter(([a, b, c, d]) => a > 2 && b > 2 && c < width - 2 && d < height - 2)
      .filter(([a, b, c, d]) => taken.every(([e, f, g, h]) => c < e || a > g || d < f || b > h))
      .sort((one, other) => hidden(one) - hidden(other));
    if (!places.length) return [];
    taken.push(places[0]);
    const [left, , , bottom] = places[0];
    return [svg("text", { class: kind, x: left + half, y: bottom - 4, "text-anchor": "middle" }, text)];
  });
}
