-- The business transaction of every producer: two rows of two tables, by their keys.
-- Made once in each database:
CREATE SCHEMA bench;
CREATE TABLE bench.certifications (id bigint PRIMARY KEY, status text NOT NULL, changed_at timestamptz NOT NULL);
CREATE TABLE bench.mentors (id bigint PRIMARY KEY, visible boolean NOT NULL, version bigint NOT NULL);
INSERT INTO bench.certifications SELECT n, 'valid', now() FROM generate_series(1, 10000) AS n;
INSERT INTO bench.mentors SELECT n, true, 1 FROM generate_series(1, 10000) AS n;
-- Each time, with n at random between 1 and 10,000 and a key of its own for the event (a UUID):
--   BEGIN;
--   UPDATE bench.certifications SET status = 'expired', changed_at = now() WHERE id = n;
--   UPDATE bench.mentors SET visible = NOT visible, version = version + 1 WHERE id = n;
--   (the enqueue, or nothing)
--   COMMIT;
