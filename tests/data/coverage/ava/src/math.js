export function add(a, b) {
  return a + b;
}

export function div(a, b) {
  if (b === 0) {
    throw new RangeError(`${a} by zero`);
  } else {
    return a / b;
  }
}

export function unused(a) {
  return a;
}

export const later = async (a, each = x => x) => {
  await null;
  for (const one of [a, a]) {
    each(one);
  }
  return a ?? unused(a);
};
