#!/usr/bin/env node
// Runs for two periods: what the first report tells, the second leaves out, or counts from 0 again.
import v8 from 'node:v8';

const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));

export class Queue {
  items = [];
  static made = 0;

  push(item) {
    this.items.push(item);
    return this;
  }

  async drain(each) {
    while (this.items.length > 0) {
      const item = this.items.shift();
      if (item === 'pause') {
        v8.takeCoverage();
        await sleep(5);
        continue;
      }
      if (item === 'never') {
        throw new Error('never');
      } else {
        each(item);
      }
    }
    return '𝕕𝕠𝕟𝕖';
  }

  peek() {
    return this.items[0];
  }
}

function unused() {
  return () => 1;
}

const shout = item => item.toUpperCase();

await new Queue().push('a').push('pause').push('b').drain(shout);
