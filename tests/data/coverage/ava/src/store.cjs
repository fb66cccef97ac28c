#!/usr/bin/env node
'use strict'; // “UTF-16” is what 𝕧𝟠 counts in

class Store {
  #held = new Map();

  static of(...names) {
    const store = new Store();
    for (const name of names) store.put(name, 1);
    return store;
  }

  put(name, value) {
    this.#held.set(name, value);
  }

  get size() {
    return this.#held.size;
  }

  clear() {
    this.#held.clear();
  }
}

module.exports = {Store};
