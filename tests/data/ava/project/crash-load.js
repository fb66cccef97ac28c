// A package that is not there.
import test from 'ava';
import 'not-installed-anywhere';

test('never declared', t => t.pass());
