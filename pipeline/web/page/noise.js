// Normal noise as NumPy's default_rng(seed).standard_normal draws it: SeedSequence, PCG64, the ziggurat of 256 layers.
// Equal numbers give equal pictures for equal seeds, here and on the engine's other machines.

const MASK_32 = 0xffffffffn, MASK_64 = (1n << 64n) - 1n, MASK_128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL = 4;

/** SeedSequence of a whole number: eight words of 32 bits. */
function seedWords(seed) {
  const entropy = [];
  for (let rest = seed; rest > 0n || entropy.length === 0; rest >>= 32n) entropy.push(Number(rest & MASK_32));
  let constant = 0x43b0d7e5;
  const hashed = (value) => {
    let mixed = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    mixed = Math.imul(mixed, constant) >>> 0;
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const mixed = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) >>> 0;
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
  const pool = [];
  for (let i = 0; i < POOL; i++) pool.push(hashed(i < entropy.length ? entropy[i] : 0));
  for (let from = 0; from < POOL; from++)
    for (let to = 0; to < POOL; to++) if (from !== to) pool[to] = mix(pool[to], hashed(pool[from]));
  for (let from = POOL; from < entropy.length; from++)
    for (let to = 0; to < POOL; to++) pool[to] = mix(pool[to], hashed(entropy[from]));

  constant = 0x8b51f9dd;
  return Array.from({ length: 8 }, (_, i) => {
    let word = (pool[i % POOL] ^ constant) >>> 0;
    constant = Math.imul(constant, 0x58f38ded) >>> 0;
    word = Math.imul(word, constant) >>> 0;
    return BigInt((word ^ (word >>> 16)) >>> 0);
  });
}

/** PCG64: 128 bits of state, 64 at a time. Returns the function that gives the next ones. */
export function pcg64(seed) {
  const words = seedWords(seed);
  const pair = (i) => words[i] | (words[i + 1] << 32n);
  const increment = ((((pair(4) << 64n) | pair(6)) << 1n) | 1n) & MASK_128;
  let state = 0n;
  const step = () => (state = (state * MULTIPLIER + increment) & MASK_128);
  step();
  state = (state + ((pair(0) << 64n) | pair(2))) & MASK_128;
  step();
  return () => {
    step();
    const folded = ((state >> 64n) ^ state) & MASK_64, turn = state >> 122n;
    return ((folded >> turn) | (folded << (64n - turn))) & MASK_64;
  };
}

/**
 * `count` normal numbers. tables: {r, inv_r, ki, wi, fi} of the ziggurat, as the exporter
 * computes them. Float32Array, rounded once.
 */
export function standardNormal(seed, count, tables) {
  const next = pcg64(BigInt(seed));
  const uniform = () => Number(next() >> 11n) / 9007199254740992;
  const { ki, wi, fi, r, inv_r: inverse } = tables;
  const one = () => {
    for (;;) {
      const bits = next();
      const layer = Number(bits & 0xffn), negative = (bits >> 8n) & 1n, whole = (bits >> 9n) & 0xfffffffffffffn;
      const size = Number(whole);
      const x = negative ? -(size * wi[layer]) : size * wi[layer];
      if (size < ki[layer]) return x;
      if (layer === 0) {
        for (;;) {
          const beyond = -inverse * Math.log1p(-uniform()), height = -Math.log1p(-uniform());
          if (height + height > beyond * beyond) return (whole >> 8n) & 1n ? -(r + beyond) : r + beyond;
        }
      }
      if ((fi[layer - 1] - fi[layer]) * uniform() + fi[layer] < Math.exp(-0.5 * x * x)) return x;
    }
  };
  return Float32Array.from({ length: count }, one);
}
