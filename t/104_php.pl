# PHP's clients count: PDO and Eloquent.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my ($php) = programs('php') or plan skip_all => 'php-cli is not installed';

plan skip_all => 'php-pgsql is not installed'
  unless can_run('php-pgsql', $php, '-r', 'exit(extension_loaded("pdo_pgsql") ? 0 : 1);');

my $node = client_node('php');

{
	my $seen = run_client({}, $php, program('php/with_pdo.php'));

	is($seen->{row}, '42P18', 'parameters in ROW() have no type');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added');
	counted('pdo', $seen, emulated => 5);
}

if (can_run('php-illuminate-database', $php, '-r', 'exit(stream_resolve_include_path("Illuminate/Database/autoload.php") ? 0 : 1);'))
{
	my $seen = run_client({}, $php, program('php/with_eloquent.php'));

	is($seen->{rows}, 1, 'increment() tells that it has updated a row');
	is($seen->{update}, '0A000', 'the buffer cannot be updated');
	counted('eloquent', $seen);
}

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
