// A test that kills its own process: the whole of AVA with worker threads, only the file without.
import process from 'node:process';
import test from 'ava';

test.serial('done before', t => t.pass());
test.serial('kills', () => new Promise(() => {
	process.kill(process.pid, 'SIGKILL');
}));
test.serial('never starts', t => t.pass());
