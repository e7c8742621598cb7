# A lasting failure does not fill the log: not of keys, not of a whole buffer,
# and not with counts that are discarded; and the log tells how much it has not
# told.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use WasteTest;

my $db = 'postgres';
my $node = new_node('noisy');

# Three hundred keys fail, each again and again.  The log says so once, and
# then, when something else happens, how often it has not.
my $offset = -s $node->logfile;
sql(q{
	CREATE TABLE reason (code text);
	INSERT INTO reason VALUES ('P0001');
	CREATE FUNCTION noisy_store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		RAISE 'no, not %', key USING ERRCODE = (SELECT code FROM reason);
	END $$;
	CREATE FOREIGN TABLE noisy (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'noisy_store', interval '0', timeout '1h', backoff '1ms');
	INSERT INTO noisy SELECT 'key ' || i FROM generate_series(1, 300) i;
});
wait_for($node, $db, q{SELECT failures > 1000 FROM sb_stat_buffers WHERE buffer = 'noisy'}, 'a thousand attempts fail');
cmp_ok(lines_in_log($node, qr/could not flush .*"noisy"/, $offset), '<=', 3, 'the log tells of a few of them');
sql(q{UPDATE reason SET code = '22012'});
$node->wait_for_log(qr/could not flush .*"noisy".*\n(?:.*\n)*?.*\d+ failures since the last such message/, $offset);
my ($suppressed) = slurp_file($node->logfile, $offset) =~ /(\d+) failures since the last such message/;
cmp_ok($suppressed, '>', 900, 'and then, of how many it did not');
cmp_ok($suppressed, '<=', sql(q{SELECT failures FROM sb_stat_buffers WHERE buffer = 'noisy'}), 'which is right');
sql('DROP FOREIGN TABLE noisy');

# One failure that was not told is one failure.
$offset = -s $node->logfile;
sql(q{
	UPDATE reason SET code = 'P0001';
	CREATE FOREIGN TABLE single (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'noisy_store', interval '0', timeout '1h', backoff '1h');
	INSERT INTO single VALUES ('k')});
my $single = q{FROM sb_stat_buffers WHERE buffer = 'single'};
wait_for($node, $db, "SELECT failures = 1 $single", 'a key fails');
sql(q{SELECT sb_flush('k', 'single')});
wait_for($node, $db, "SELECT failures = 2 $single", 'it fails again');
wait_for($node, $db, "SELECT last_error_at < clock_timestamp() - interval '2s' $single", 'a while passes');
sql(q{UPDATE reason SET code = '22012'; SELECT sb_flush('k', 'single')});
$node->wait_for_log(qr/could not flush 1 key .*"single".*\n(?:.*\n)*?\s1 failure since the last such message/, $offset);
pass('the log says how often, in good English');
sql('DROP FOREIGN TABLE single');

# The same for counts that are discarded: no more lines, and not one count
# less.
$offset = -s $node->logfile;
sql(q{
	CREATE FOREIGN TABLE careless (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'noisy_store', interval '0', timeout '100ms', restart 'temporary');
	INSERT INTO careless SELECT 'key ' || i, 3 FROM generate_series(1, 500) i;
});
wait_for($node, $db, q{SELECT discarded = 1500 AND pid IS NULL FROM sb_stat_buffers WHERE buffer = 'careless'},
	'500 keys are discarded, and the worker has left');
my @discarded = slurp_file($node->logfile, $offset) =~ /discarded counts of buffer "careless": (\d+)/g;
cmp_ok(scalar @discarded, '<=', 5, 'the log tells it in a few lines');
is(eval { my $sum = 0; $sum += $_ for @discarded; $sum }, 1500, 'and tells of everything');

# Nor when one worker serves many such buffers in turn: it is for each of them
# again and again, but logs it for each as seldom.
$offset = -s $node->logfile;
$node->append_conf('postgresql.conf', 'statbuffer.max_workers = 1');
$node->reload;
sql(q{
	DO $$
	BEGIN
		FOR i IN 1 .. 10 LOOP
			EXECUTE format($f$
				CREATE FOREIGN TABLE turn_%s (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
				SERVER statbuffer OPTIONS (handler 'noisy_store', interval '10ms', restart 'temporary')$f$, i);
		END LOOP;
		COMMIT;
		FOR round IN 1 .. 100 LOOP
			FOR i IN 1 .. 10 LOOP
				PERFORM sb_increment('k', 1, ('turn_' || i)::regclass);
			END LOOP;
			COMMIT;
			PERFORM pg_sleep(0.02);
		END LOOP;
	END $$});
wait_for($node, $db, q{SELECT sum(discarded) = 1000 FROM sb_stat_buffers WHERE buffer LIKE 'turn%'}, 'ten buffers discard a thousand counts');
cmp_ok(lines_in_log($node, qr/discarded counts of buffer "turn_/, $offset), '<=', 30, 'the log tells it in a few lines');
note lines_in_log($node, qr/discarded counts of buffer "turn_/, $offset) . ' lines';
$node->append_conf('postgresql.conf', 'statbuffer.max_workers = 4');
$node->reload;

# A handler that is missing keeps the buffer from being flushed at all.  Its
# worker does not stay for that; but another one comes with each request.  The
# log tells of such failures once a minute, and five hundred can take minutes.
$offset = -s $node->logfile;
my $begun = time;
sql($fail_procedure);
sql(q{
	CREATE FOREIGN TABLE broken (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_such_handler', interval '0', timeout '1h', backoff '1ms');
	SELECT sb_increment('k', 1, 'broken');
	CALL fail('broken', 500);
});
my $minutes = int((time - $begun) / 60);
cmp_ok(lines_in_log($node, qr/could not flush buffer "broken"/, $offset), '<=', 3 + $minutes,
	'a buffer that is broken does not fill the log either');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
