import {spawnSync} from 'node:child_process';
import {fileURLToPath} from 'node:url';
import {Worker, isMainThread, workerData} from 'node:worker_threads';

export function inChild(word) {
  return spawnSync(process.execPath, [fileURLToPath(import.meta.url), word], {encoding: 'utf8'}).stdout;
}

export function inThread(word) {
  return new Promise((resolve, reject) => {
    const worker = new Worker(new URL(import.meta.url), {workerData: word});
    worker.once('error', reject);
    worker.once('exit', resolve);
  });
}

function spoken(word) {
  return `child ${word}`;
}

function threaded(word) {
  return `thread ${word}`;
}

if (process.argv[2] === 'hello') {
  process.stdout.write(spoken(process.argv[2]));
} else if (!isMainThread && workerData === 'hello') {
  threaded(workerData);
}
