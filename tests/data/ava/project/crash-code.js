// An error with a code, at load.
import test from 'ava';

const error = new Error('no such door');
error.code = 'ENODOOR';
throw error;

test('never declared', t => t.pass()); // eslint-disable-line no-unreachable
