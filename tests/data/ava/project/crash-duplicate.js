// The same title twice.
import test from 'ava';

test('twice', t => t.pass());
test('once', t => t.pass());
test('twice', t => t.pass());
