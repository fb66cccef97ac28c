'use strict';
// Preloaded into the product's Node processes (node --require), worker threads too: writes what V8 counted each period,
// so that a process that is killed loses no more than one. It never throws, and keeps no process alive.
// Source: drill sheet, "Probe sources", V8.
try {
  const fs = require('fs');
  const path = require('path');
  const v8 = require('v8');
  const {threadId} = require('worker_threads');

  const ours = process.env.EMISSARY_V8;
  const theirs = process.env.NODE_V8_COVERAGE;
  const own = `${process.pid}-${threadId}`;

  // Where the product counts by itself (c8 ava), Node writes into its folder, and ours gets another name of each file.
  const linked = new Set();
  const link = () => {
    for (const name of fs.readdirSync(theirs)) {
      const [, pid, , thread] = name.split(/[-.]/);
      if (`${pid}-${thread}` !== own || linked.has(name)) continue;
      linked.add(name);
      const [from, to] = [path.join(theirs, name), path.join(ours, name)];
      try {
        fs.linkSync(from, to);
      } catch {
        fs.copyFileSync(from, to, fs.constants.COPYFILE_EXCL);
      }
    }
  };
  // What V8 counted is gone once it is taken, though the disk has no room for it: it is taken when there is some again.
  const LEAST = 4 * 2 ** 20; // bytes: what some processes write at once
  const isFull = () => {
    try {
      const {blocks, bavail, bsize} = fs.statfsSync(ours);
      return blocks > 0 && bavail * bsize < LEAST;
    } catch {
      return false; // Node before 18.15 has no statfs
    }
  };
  const {now} = Date; // as it is before a test fakes it
  const take = () => {
    try {
      // A test fakes the disk, or nobody reads any more: Node would make the folder anew.
      if (!fs.existsSync(ours) || isFull()) return;
      v8.takeCoverage();
      // The file's name has the millisecond: the next of this thread, at its exit maybe, must not overwrite it.
      for (const taken = now(); now() === taken; );
      if (theirs !== ours) link();
    } catch {
      // The folder is gone, say: the product runs on without.
    }
  };

  // AVA's own process starts workers and reads what they tell. It runs none of the product, and to count costs it most.
  const isAva = threadId === 0 && /[\\/](\.bin[\\/]ava|ava[\\/]entrypoints[\\/]cli\.m?js)$/.test(process.argv[1]);

  if (isAva && ours && theirs === ours) {
    // v8.stopCoverage() would have Node complain on stderr at its end.
    const session = new (require('inspector').Session)();
    session.connect();
    session.post('Profiler.enable');
    session.post('Profiler.stopPreciseCoverage');
    session.disconnect();
  } else if (ours && theirs && v8.takeCoverage) {
    setInterval(take, Number(process.env.EMISSARY_V8_MS) || 1000).unref();
    if (theirs !== ours) process.on('exit', take);
    // Whose child this is, by the name of an empty file: the child of a test belongs to the test.
    const parent = process.env.EMISSARY_V8_FROM || '0-0';
    process.env.EMISSARY_V8_FROM = own;
    fs.writeFileSync(path.join(ours, `begun-${own}-${parent}`), '');
  }
} catch {
  // Whatever it is, it is no reason to stop the product.
}
