import test from 'ava';
import {add, later} from './src/math.js';
import {Store} from './src/store.cjs';

test('adds', t => t.is(add(1, 2), 3));
test('later', async t => t.is(await later(1), 1));
test('holds', t => t.is(Store.of('a', 'b').size, 2));
